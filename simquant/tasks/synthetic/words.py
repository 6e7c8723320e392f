"""Words and sentences of synthetic tasks; their order determines the items of a seed."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Boris Clara David Elena Frank Grace Henry Iris James Karen Louis Maria Niko Olive Peter Ruth Tom")

TOWNS = _words("Ashford Bremen Cadiz Delft Exeter Ghent Izmir Kyoto Lagos Malmo Oslo Porto Riga Siena Tartu Vienna")

HIDING_PLACES = _words(
    "attic barn cellar chapel cupboard fireplace fountain garage greenhouse kitchen library mill stable tower well"
)

THINGS = _words(
    """
    anchor apple arrow basket bell bicycle blanket boat book bottle bowl brick bridge broom brush bucket button camera
    candle carpet cart chair clock coat coin compass cup curtain desk door drum engine envelope feather fence flag
    flute fork frame garden glove hammer harp hat helmet jacket jar kettle kite knife ladder lamp lantern letter lock
    map mask mirror needle oven paddle painting pencil piano pillow pipe plate plough purse puzzle radio rope ruler
    saddle sail scarf scissors shelf shield shoe shovel sofa spoon stamp statue stove table tent ticket towel train
    tray trumpet tunnel umbrella vase violin wagon wallet wheel whistle window wreath
    """
)

FILLER = (
    "The market opened early, and the baker set out warm bread.",
    "Rain had fallen in the night, so the paths were soft.",
    "Two children were throwing sticks into the stream.",
    "The old bus climbed the hill more slowly than anyone liked.",
    "Somebody had painted the gate a cheerful shade of green.",
    "A dog slept in the shade and did not look up.",
    "The letters on the sign had faded over many summers.",
    "She poured the tea and waited for it to cool.",
    "In the harbour the boats knocked gently against each other.",
    "He could not recall where the song came from.",
    "The teacher wiped the board and opened a window.",
    "Swallows were gathering along the telephone wire.",
    "There was talk of a new road, but nobody had seen a plan.",
    "The soup needed salt, and the cook knew it.",
    "A train passed far away, and then it was quiet again.",
    "The museum was closed for repairs until the spring.",
    "They argued about the film all the way home.",
    "Her brother grew tomatoes on the balcony and gave most of them away.",
    "The wind turned, and the smell of hay came over the wall.",
    "Nobody had swept the stairs since the guests had left.",
    "The lake was still enough to show every cloud.",
    "A farmer leaned on the fence and watched the tractor go by.",
    "The library smelled of paper and floor polish.",
    "On the corner an old man was selling roasted nuts.",
    "The lights went on one after another along the shore.",
    "It was too warm for a coat and too cold without one.",
    "The orchestra tuned for a long while before it began.",
    "Somewhere upstairs a door was closed with care.",
    "The cat had found the only patch of sun in the room.",
    "Their neighbours were kind and asked few questions.",
    "A kite hung above the meadow as if it were nailed there.",
    "The shop sold rope, lamp oil and very strong coffee.",
)
"""Filler sentences without numbers, none of which answers a question."""
