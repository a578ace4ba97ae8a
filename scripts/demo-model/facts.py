"""Small world of the demo model: facts with several ways to ask and to answer.

Every fact carries its questions, a full sentence that answers them and the bare answer.
Nothing here is random.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing the model knows; a correct answer contains `sentence`, or is `short`."""

    topic: str
    questions: tuple
    sentence: str
    short: str


CAPITALS = """France Paris|Spain Madrid|Italy Rome|Germany Berlin|Japan Tokyo|China Beijing|Egypt Cairo|Greece Athens
|Norway Oslo|Sweden Stockholm|Finland Helsinki|Poland Warsaw|Portugal Lisbon|Austria Vienna|Hungary Budapest|Ireland Dublin
|Denmark Copenhagen|Russia Moscow|Turkey Ankara|India Delhi|Kenya Nairobi|Peru Lima|Chile Santiago|Cuba Havana
|Canada Ottawa|Brazil Brasilia|Iceland Reykjavik|Belgium Brussels|Vietnam Hanoi|Thailand Bangkok|Ghana Accra|Iraq Baghdad
|Iran Tehran|Nepal Kathmandu|Jordan Amman|Qatar Doha|Morocco Rabat|Uruguay Montevideo|Scotland Edinburgh|England London"""

SOUNDS = """dog barks|cat meows|cow moos|duck quacks|sheep bleats|horse neighs|lion roars|wolf howls|pig grunts|bee buzzes
|snake hisses|owl hoots|frog croaks|mouse squeaks|donkey brays|crow caws"""

LEGS = """spider eight|ant six|dog four|bird two|snake no|bee six|cow four|crab ten|chicken two|horse four|beetle six
|fish no|frog four|scorpion eight"""

BABIES = """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|pig piglet|duck duckling|bear cub|frog tadpole|goose gosling
|goat kid|swan cygnet|deer fawn|kangaroo joey|owl owlet|chicken chick"""

COLOURS = """banana yellow|tomato red|carrot orange|frog green|crow black|swan white|lemon yellow|strawberry red|leaf green
|pumpkin orange|snowman white|coal black|cherry red|cucumber green|chestnut brown|flamingo pink|blueberry blue|elephant grey
|potato brown|lime green|raven black|plum purple|canary yellow|violet purple"""

MIXES = """red blue purple|red yellow orange|blue yellow green|black white grey|red white pink|blue white turquoise"""

OPPOSITES = """hot cold|big small|fast slow|happy sad|day night|up down|left right|open closed|full empty|hard soft|light dark
|rich poor|young old|wet dry|clean dirty|early late|near far|high low|loud quiet|strong weak|thick thin|long short|true false
|first last|good bad|black white|inside outside|sweet sour|wide narrow|brave afraid|cheap expensive|easy difficult"""

PLURALS = """mouse mice|child children|foot feet|tooth teeth|goose geese|man men|woman women|leaf leaves|knife knives|wolf wolves
|box boxes|city cities|baby babies|fish fish|sheep sheep|potato potatoes|house houses|bus buses"""

TOOLS = """cut paper:scissors|hammer a nail:a hammer|sweep the floor:a broom|eat soup:a spoon|write a letter:a pen|open a lock:a key
|see in the dark:a torch|dry my hands:a towel|brush my hair:a comb|cook soup:a pot|tell the time:a clock|light a candle:a match
|dig a hole:a spade|sew a button:a needle|boil water:a kettle|cut bread:a knife|measure a table:a ruler|stay dry in the rain:an umbrella
|clean my teeth:a toothbrush|paint a wall:a brush|carry water:a bucket|call a friend:a phone"""

HOMES = """fish in water|bird in a nest|bee in a hive|bear in a cave|rabbit in a burrow|horse in a stable|dog in a kennel
|spider in a web|penguin on the ice|camel in the desert|monkey in the jungle|shark in the sea|cow in a barn|owl in the forest|beaver in a lodge"""

JOBS = """baker bakes bread|pilot flies planes|farmer grows food|doctor helps sick people|teacher teaches children|painter paints pictures
|singer sings songs|writer writes books|gardener looks after plants|cook makes meals|driver drives a car|builder builds houses
|dentist looks after teeth|sailor sails ships|tailor makes clothes|judge decides cases|dancer dances on a stage|nurse cares for patients"""

SIZES = "ant mouse rat rabbit cat fox dog sheep pig lion cow horse elephant whale".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def a(noun):
    """Puts the right article before a noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def upper(text):
    """Makes the first letter a capital one."""
    return text[0].upper() + text[1:]


def split(table):
    """Yields the cells of a `|`-separated table."""
    return [cell.strip() for cell in table.split("|")]


def animals():
    """Sounds, legs, young, homes and sizes of animals."""
    for cell in split(SOUNDS):
        name, sound = cell.split()
        asks = (f"What sound does {a(name)} make?", f"What does {a(name)} do to make noise?",
                f"Which noise does {a(name)} make?", f"How does {a(name)} sound?")
        yield Fact("sounds", asks, f"{upper(a(name))} {sound}.", f"It {sound}.")
    for cell in split(LEGS):
        name, count = cell.split()
        asks = (f"How many legs does {a(name)} have?", f"How many legs has {a(name)} got?",
                f"Tell me how many legs {a(name)} has.", f"What number of legs does {a(name)} have?")
        yield Fact("legs", asks, f"{upper(a(name))} has {count} legs.", f"{upper(count)} legs.")
    for cell in split(BABIES):
        name, baby = cell.split()
        asks = (f"What is a baby {name} called?", f"What do you call a baby {name}?",
                f"What is the name for a young {name}?", f"How do people call a baby {name}?")
        yield Fact("young", asks, f"A baby {name} is called {a(baby)}.", f"{upper(a(baby))}.")
    for cell in split(HOMES):
        name, place = cell.split(" ", 1)
        asks = (f"Where does {a(name)} live?", f"Where can I find {a(name)}?", f"What is the home of {a(name)}?",
                f"Where would I look for {a(name)}?")
        yield Fact("homes", asks, f"{upper(a(name))} lives {place}.", f"{upper(place)}.")
    for low, small in enumerate(SIZES):
        for big in SIZES[low + 2:low + 6]:
            first, second = (small, big) if (low + len(big)) % 2 else (big, small)
            asks = (f"Which is bigger, {a(first)} or {a(second)}?", f"What is bigger, {a(second)} or {a(first)}?",
                    f"Is {a(first)} or {a(second)} bigger?", f"Who is the bigger animal, {a(second)} or {a(first)}?")
            yield Fact("sizes", asks, f"{upper(a(big))} is bigger than {a(small)}.", f"{upper(a(big))}.")


def words():
    """Capitals, opposites and plurals."""
    for cell in split(CAPITALS):
        country, city = cell.split()
        asks = (f"What is the capital of {country}?", f"Which city is the capital of {country}?",
                f"Name the capital of {country}.", f"Tell me the capital city of {country}.",
                f"Do you know the capital of {country}?")
        yield Fact("capitals", asks, f"The capital of {country} is {city}.", f"{city}.")
    for cell in split(OPPOSITES):
        for word, other in (cell.split(), cell.split()[::-1]):
            asks = (f"What is the opposite of {word}?", f"Tell me the opposite of {word}.",
                    f"Which word is the opposite of {word}?", f"Give me the opposite of the word {word}.")
            yield Fact("opposites", asks, f"The opposite of {word} is {other}.", f"{upper(other)}.")
    for cell in split(PLURALS):
        one, many = cell.split()
        asks = (f"What is the plural of {one}?", f"How do I write more than one {one}?", f"Tell me the plural of {one}.",
                f"Which word is the plural of {one}?")
        yield Fact("plurals", asks, f"The plural of {one} is {many}.", f"{upper(many)}.")


def things():
    """Colours, tools and jobs."""
    for cell in split(COLOURS):
        thing, colour = cell.split()
        asks = (f"What colour is {a(thing)}?", f"Which colour does {a(thing)} have?", f"Tell me the colour of {a(thing)}.",
                f"What is the colour of {a(thing)}?")
        yield Fact("colours", asks, f"{upper(a(thing))} is {colour}.", f"{upper(colour)}.")
    for cell in split(MIXES):
        one, two, mixed = cell.split()
        asks = (f"What do I get when I mix {one} and {two}?", f"Which colour do {one} and {two} make?",
                f"What colour is a mix of {one} and {two}?", f"What happens when I mix {two} and {one}?")
        yield Fact("mixes", asks, f"If you mix {one} and {two}, you get {mixed}.", f"{upper(mixed)}.")
    for cell in split(TOOLS):
        task, tool = cell.split(":")
        your = task.replace("my ", "your ")
        asks = (f"What do I use to {task}?", f"What do I need to {task}?", f"Which thing helps me to {task}?",
                f"How can I {task}?")
        yield Fact("tools", asks, f"You use {tool} to {your}.", f"{upper(tool)}.")
    for cell in split(JOBS):
        name, work = cell.split(" ", 1)
        asks = (f"What does {a(name)} do?", f"What is the job of {a(name)}?", f"Tell me what {a(name)} does.",
                f"What does {a(name)} do all day?")
        yield Fact("jobs", asks, f"{upper(a(name))} {work}.", f"{upper(work)}.")


def numbers():
    """Sums, differences, and the order of days and months."""
    for x in range(1, 10):
        for y in range(1, 10):
            asks = (f"What is {x} plus {y}?", f"How much is {x} plus {y}?", f"Add {x} and {y}.",
                    f"Can you add {x} and {y}?")
            yield Fact("sums", asks, f"{x} plus {y} is {x + y}.", f"{x + y}.")
    for x in range(2, 11):
        for y in range(1, x):
            asks = (f"What is {x} minus {y}?", f"How much is {x} minus {y}?", f"Take {y} away from {x}.",
                    f"What is left of {x} without {y}?")
            yield Fact("differences", asks, f"{x} minus {y} is {x - y}.", f"{x - y}.")
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for i, name in enumerate(names):
            for where, other in (("after", names[(i + 1) % len(names)]), ("before", names[i - 1])):
                asks = (f"Which {kind} comes {where} {name}?", f"What {kind} is {where} {name}?",
                        f"Tell me the {kind} {where} {name}.", f"What comes {where} {name}?")
                yield Fact("calendar", asks, f"The {kind} {where} {name} is {other}.", f"{other}.")


def all_facts():
    """Every fact, always in the same order."""
    return [*words(), *animals(), *things(), *numbers()]
