"""Words of the demo text; their order determines the text of a seed."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Alba Anton Astrid Balint Bela Bruno Carla Cleo Dario Dina Edda Elio Emma Enzo Fabia Felix Flora Greta Gustav
    Hanna Hugo Ida Igor Irma Jakob Jonas Julia Karim Lea Leon Lina Luca Magda Marco Mila Mina Nadia Nils Nora Olga
    Oskar Otto Paula Pavel Petra Rafael Rosa Ruben Sara Selma Simon Sofia Stella Theo Tilda Ursula Vera Viktor Wanda
    Yara Zora
    """
)
OBJECTS = _words(
    """
    anchor apron arrow axe badge ball banner barrel basket bell belt blanket boat book bottle bowl box bracelet
    brick bridle broom brush bucket button cable cage camera candle cape card carpet cart chain chair chalk chest
    clock cloak coat coin comb compass crate crown cup curtain cushion desk diary dish doll door dress drum engine
    envelope fan feather fence fiddle flag flute fork frame funnel gate gear glove goblet hammer harp hat helmet
    hook horn jacket jar jewel jug kettle key kite knife ladder lamp lantern lens letter lever lock locket loom
    magnet mallet map mask mast medal mirror mitten mug nail necklace needle net notebook oar oven paddle painting
    parcel pearl pen pencil pillow pin pipe plate plough pot puppet purse puzzle quilt raft rake ribbon ring robe
    rope ruler sack saddle sail scarf scissors scroll shawl shelf shield ship shoe shovel sign sled spade spear
    sponge spoon stamp statue stool stove sword table tent thimble thread ticket tile torch towel tower toy tray
    trophy trumpet tube umbrella vase veil violin wagon wallet watch wheel whip whistle window wreath
    """
)
ADJECTIVES = _words(
    """
    ancient blunt brave bright broad broken calm careful cheap clean clever cold crooked curious dark deep delicate
    dry dusty empty famous fancy fine flat fresh gentle giant golden grand greasy heavy hidden hollow honest huge
    humble icy large lazy light little lonely long loud lovely lucky modern muddy narrow neat new noble odd old pale
    patient plain polite poor proud quick quiet rare rich rough round rusty sharp shiny short shy silent silver
    simple small smooth soft sour square steep strange strong sweet tall tiny tired ugly useful warm weak wet wide
    wild wise wooden young
    """
)
COLOURS = _words(
    """
    amber black blue brown copper crimson green grey orange pink purple red scarlet turquoise violet white yellow
    """
)
PLACES = _words(
    """
    abbey airport attic bakery barn beach bridge canal castle cave cellar chapel church cliff coast courtyard desert
    farm ferry field forest fort fountain garden glacier harbour hill hospital hotel island kitchen lake library
    lighthouse market meadow mill mine monastery mountain museum orchard palace park pier quarry river school shop
    square stable station swamp temple theatre tunnel valley village vineyard warehouse waterfall windmill workshop
    """
)
ANIMALS = _words(
    """
    ant badger bat bear beaver bee bull camel cat cow crab crane crow deer dog dolphin donkey duck eagle falcon
    ferret fox frog goat goose hare hawk hedgehog horse lamb lion lizard mole monkey moose mouse otter owl ox parrot
    pig pony rabbit rat raven seal sheep snail snake spider squirrel stork swan tiger toad turtle weasel whale wolf
    zebra
    """
)
FOODS = _words(
    """
    almonds apples bacon barley beans beets berries biscuits bread butter cabbage cake carrots cheese cherries
    chestnuts corn cream cucumbers dates dumplings eggs figs fish garlic ginger grapes honey jam lemons lentils
    lettuce melons milk mushrooms mustard noodles nuts oats olives onions pancakes peaches pears peas pepper pickles
    pie plums porridge potatoes pudding pumpkin radishes raisins rice salad salt sausages soup spinach stew sugar
    syrup tea toast tomatoes turnips vinegar walnuts
    """
)
JOBS = _words(
    """
    actor baker banker barber builder butcher captain carpenter chemist clerk cook dancer dentist doctor driver
    farmer fisher gardener guard hunter judge lawyer mason merchant miller miner nurse painter pilot plumber poet
    porter potter printer sailor scholar shepherd singer smith soldier surgeon tailor teacher waiter weaver writer
    """
)
FEELINGS = _words(
    """
    afraid amused angry ashamed bored cheerful confused content eager excited glad grateful guilty happy hopeful
    jealous nervous pleased puzzled relieved sad satisfied serious surprised thankful upset worried
    """
)
WEATHER = _words("cloudy dry foggy freezing frosty hot humid mild misty rainy snowy stormy sunny windy")
MATERIALS = _words(
    """
    brass bronze clay cotton glass iron ivory leather linen marble paper silk steel stone straw tin velvet wax wool
    """
)
TIMES = _words(
    """
    afternoon autumn dawn dusk evening Friday midnight Monday morning night noon Saturday spring summer Sunday
    sunset Thursday Tuesday Wednesday weekend winter
    """
)
TOWNS = _words(
    """
    Aldara Belmora Corvane Dunmere Elvast Fernholt Galdova Harnwick Istera Jorvale Kelstad Lomira Marrow Nesting
    Ostrava Pellin Quarrel Rostock Selvik Tarnow Umbria Valdane Westmar Yellin Zandor
    """
)
FOUND = _words(
    """
    borrowed bought carried caught cleaned dropped drew examined fetched found hid kept lifted lost moved noticed
    packed painted polished repaired returned shook sold stole threw touched traded washed won wrapped
    """
)
WENT = _words(
    """
    climbed cycled drove hurried ran raced rode rowed rushed sailed strolled travelled walked wandered went
    """
)
SAID = _words(
    """
    announced answered cried declared explained laughed muttered replied said shouted sighed whispered
    """
)
ORDINALS = _words("first second third fourth fifth")
LETTERS = _words("A B C D E F G H J K L M N P Q R S T U V W X Y Z")
