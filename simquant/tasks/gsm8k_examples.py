"""Eight sums with their solutions, which stand before each question; all are ours."""

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "A florist ties bunches of 12 tulips. She has 150 tulips and gives 6 of them to her sister. How many bunches "
        "can she tie from the rest?",
        "After the gift she has 150 - 6 = 144 tulips. They make 144 / 12 = 12 bunches.\n#### 12",
    ),
    (
        "Marek reads 20 pages on Monday, twice as many on Tuesday and 15 fewer on Wednesday than on Tuesday. How many "
        "pages does he read in the three days?",
        "On Tuesday he reads 2 * 20 = 40 pages. On Wednesday he reads 40 - 15 = 25 pages. Together that is "
        "20 + 40 + 25 = 85 pages.\n#### 85",
    ),
    (
        "A ferry carries 45 cars at a fare of $18 each. A quarter of a full ferry's cars are let on for free on "
        "holidays, rounded down. How many dollars does a full ferry earn on a holiday?",
        "A quarter of 45 is 11.25, so 11 cars go for free. The other 45 - 11 = 34 cars pay 34 * 18 = 612 dollars.\n"
        "#### 612",
    ),
    (
        "Lena has 3 jars with 24 buttons each. She uses 10 buttons for a coat and loses 2. How many are left?",
        "She starts with 3 * 24 = 72 buttons. She parts with 10 + 2 = 12 of them, so 72 - 12 = 60 are left.\n#### 60",
    ),
    (
        "A tank holds 200 litres and is 30% full. A pump adds 7 litres a minute. How many minutes until it is full?",
        "The tank holds 200 * 0.3 = 60 litres already. It takes 200 - 60 = 140 litres more. The pump needs "
        "140 / 7 = 20 minutes.\n#### 20",
    ),
    (
        "Tickets cost $9 for adults and $5 for children. A family of 2 adults and 3 children pays with a $50 note. How "
        "much change does it get, in dollars?",
        "The adults pay 2 * 9 = 18 dollars and the children 3 * 5 = 15 dollars, together 18 + 15 = 33 dollars. The "
        "change is 50 - 33 = 17 dollars.\n#### 17",
    ),
    (
        "Omar is 4 years older than Pia, and Pia is three times as old as Quinn. If Quinn is 6, how old will Omar be "
        "in 5 years?",
        "Pia is 3 * 6 = 18. Omar is 18 + 4 = 22. In 5 years he will be 22 + 5 = 27.\n#### 27",
    ),
    (
        "A bakery sold 80 rolls in the morning at 60 cents each, and the remaining 40 in the evening at half the "
        "price. How many dollars did it take?",
        "In the morning it took 80 * 0.60 = 48 dollars. In the evening a roll cost 0.60 / 2 = 0.30 dollars, so 40 "
        "rolls brought 40 * 0.30 = 12 dollars. Together that is 48 + 12 = 60 dollars.\n#### 60",
    ),
)
