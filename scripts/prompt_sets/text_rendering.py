"""Generates prompts that ask for a text in the image, for OCR rewards.

Every prompt contains exactly one double-quoted string, which ``metadata["text"]`` repeats. A setting
lists objects that can carry a text, places, styles of writing and patterns of texts.
"""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Objects that carry texts of one kind, and phrases that can be combined with any of them.

    ``texts`` are patterns over ``SLOTS``.
    """

    things: tuple[str, ...]
    places: tuple[str, ...]
    writing: tuple[str, ...]
    texts: tuple[str, ...]
    lights: tuple[str, ...]


SENTENCES = (
    '{style} of {thing} {place}, with the text "{text}" {writing}, {light}',
    '{thing} that reads "{text}" {writing}, {place}, {light}',
    '{thing} {place} saying "{text}" {writing}. {style}, {light}',
    '{light}, {thing} {place}, and on it "{text}" {writing}',
    '"{text}" {writing} on {thing} {place}, {light}',
    '{thing} with "{text}" {writing}',
    '{style} showing {thing} with "{text}" {writing}, {light}',
    '{place}, {thing} that says "{text}" {writing}',
)
STYLES = (
    "a close-up photograph",
    "a wide-angle photograph",
    "a grainy film photograph",
    "a watercolour painting",
    "an oil painting",
    "a detailed digital illustration",
    "a flat vector illustration",
    "a realistic 3D render",
    "a comic panel",
)
MAX_TEXTS_PER_PATTERN = 14
"""Keeps patterns with many fillings from crowding out fixed phrases."""

# fmt: off
SLOTS: dict[str, tuple[str, ...]] = {
    "surname": ("Marlow", "Finch", "Okafor", "Lindqvist", "Tanaka", "Moreau", "Castellan", "Pruitt",
                "Abernathy", "Novak", "Delgado", "Whitlock", "Hargreave", "Sorensen"),
    "name": ("Ada", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonah",
             "Kira", "Leo", "Maya", "Nils", "Olga", "Priya", "Rosa", "Tomas"),
    "town": ("Lisbon", "Oslo", "Kyoto", "Havana", "Tallinn", "Bergen", "Quito", "Fairhaven",
             "Galway", "Zanzibar", "Maplewood", "Stonebridge", "Porto", "Windmere", "Cape Hollow",
             "Riga"),
    "animal": ("Bear", "Heron", "Badger", "Puffin", "Whale", "Raven", "Panther", "Tortoise", "Hare",
               "Falcon", "Beaver", "Moth", "Hedgehog", "Stag"),
    "adjective": ("Silent", "Crooked", "Golden", "Velvet", "Wandering", "Hollow", "Scarlet",
                  "Forgotten", "Electric", "Sleepy", "Northern", "Paper", "Midnight", "Restless"),
    "noun": ("Lantern", "Harbor", "Clockmaker", "Garden", "Compass", "Orchard", "Tide", "Mirror",
             "Thunder", "Bridge", "Ember", "River", "Feather", "Horizon"),
    "virtue": ("Courage", "Patience", "Kindness", "Wonder", "Honesty", "Laughter", "Peace",
               "Trust"),
    "flower": ("Lavender", "Tulip", "Jasmine", "Poppy", "Magnolia", "Iris", "Dahlia", "Marigold"),
    "fruit": ("Plum", "Cherry", "Apricot", "Lemon", "Quince", "Pear", "Fig", "Blackberry", "Mango"),
    "dish": ("Lentil Soup", "Onion Tart", "Pea Risotto", "Bean Stew", "Ramen", "Fish Pie",
             "Gnocchi"),
    "pet": ("Dog", "Cat", "Parrot", "Rabbit", "Goldfish", "Hamster", "Goat", "Geese"),
    "season": ("Spring", "Summer", "Autumn", "Winter"),
    "month": ("January", "March", "April", "May", "June", "August", "October", "December"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "hour": ("Five", "Six", "Seven", "Eight", "Nine", "Ten", "Noon", "Midnight"),
    "time": ("06:15", "07:40", "09:05", "11:30", "14:20", "16:45", "18:10", "21:55", "23:35"),
    "year": ("1794", "1826", "1851", "1887", "1903", "1928", "1949", "1966", "1978", "1992"),
    "price": ("1.80", "2.50", "3.20", "4.75", "5.90", "6.40", "8.00", "9.50"),
    "number": ("3", "7", "12", "18", "24", "36", "42", "57", "63", "75", "88", "91", "31", "99"),
    "letter": tuple("ABCDEFGHK"),
}

DAYLIGHT = (
    "in soft morning light", "under a grey overcast sky", "in the golden light of late afternoon",
    "on a bright cloudless day", "just after the rain", "in light drifting fog",
    "with long evening shadows", "on a quiet snowy day",
)
INDOOR_LIGHT = (
    "lit by a single warm lamp", "in pale light from a window", "with a softly blurred background",
    "in even studio light", "with dust floating in a sunbeam", "by candlelight", "in muted colours",
)
NIGHT_LIGHT = (
    "on a rainy night", "with reflections in the wet pavement", "under a deep violet sky",
    "late at night with nobody around", "in the blue hour after sunset", "in thick night fog",
)

SETTINGS = (
    Setting(
        things=("a wooden shop sign", "a striped shop awning", "a painted shop window",
                "an enamel sign"),
        places=("in a narrow cobbled lane", "on a busy high street", "beside a canal",
                "opposite a park"),
        writing=("in gold leaf letters", "in curly hand-painted script", "in bold cream capitals"),
        texts=("{surname} and Sons", "{surname} Bakery", "{surname} Books",
               "The {adjective} {animal}", "{flower} Florist", "Open Until {hour}",
               "{noun} Antiques", "{fruit} Tree Toys", "Fresh Bread Daily", "Keys Cut Here",
               "Shoe Repair", "Closed For Lunch", "Everything Half Price", "Violins Mended",
               "Ring The Bell", "Grand Opening"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a chalkboard menu", "a folding blackboard", "a small framed slate"),
        places=("behind a café counter", "next to an espresso machine", "by the door of a bistro",
                "between two potted herbs"),
        writing=("in white chalk", "in coloured chalk with little flourishes",
                 "in neat chalk capitals"),
        texts=("{dish} Today", "{dish} {price}", "Try Our {fruit} Tart", "{fruit} Cake {price}",
               "Iced {fruit} Tea", "{weekday} Brunch", "Happy Hour At {hour}",
               "{name} Recommends Pie", "Cash Only", "Free Refills", "Be Back Soon",
               "Soup Of The Day", "Dogs Welcome", "Kitchen Closed", "But First Coffee",
               "Ask About Cake"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a green road sign", "a tall wooden signpost", "a dented metal sign",
                "a large billboard"),
        places=("at a mountain crossroads", "on an empty desert highway",
                "at the edge of a village", "beside a forest road"),
        writing=("in plain white letters", "in reflective block capitals",
                 "in peeling black paint"),
        texts=("{town} {number} km", "Welcome To {town}", "{town} Next Left", "Ferry To {town}",
               "{animal} Crossing", "Speed Limit {number}", "Old {surname} Road", "Exit {number}",
               "Road Closed", "Falling Rocks", "Last Fuel", "Bridge Out Ahead", "Slow Down",
               "Dead End", "Steep Hill", "Use Low Gear"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a hardback novel", "an old leather-bound book", "a worn paperback",
                "a picture book"),
        places=("on a bedside table", "on a library desk", "among scattered autumn leaves",
                "in the lap of a reader"),
        writing=("in embossed gold letters", "in plain serif type", "in large ornate capitals"),
        texts=("The {adjective} {noun}", "Letters From {town}", "One {season} In {town}",
               "The {noun} Thief", "How To Draw A {animal}", "The Book Of {virtue}",
               "{name} And The {animal}", "The {surname} Diaries", "Small Hours", "Salt And Iron",
               "A Short History Of Rain", "Mushrooms", "Bread For Beginners", "The Long Way Back"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a neon sign", "a tall vertical neon sign", "a buzzing old neon sign"),
        places=("above the door of a jazz club", "in a narrow alley", "on the roof of an old hotel",
                "in the window of a diner"),
        writing=("in pink glass tubes", "in flickering blue letters", "in warm amber script"),
        texts=("Hotel {town}", "The {adjective} {animal} Bar", "Cafe {flower}", "Club {number}",
               "{surname} Billiards", "Cinema {noun}", "{dish} All Night", "{town} Lounge",
               "Open All Night", "No Vacancy", "Live Jazz", "Late Show", "Dance Hall", "Karaoke",
               "Pawn Shop", "Laundry"),
        lights=NIGHT_LIGHT,
    ),
    Setting(
        things=("a frosted layer cake", "a dark chocolate cake", "a tray of iced biscuits"),
        places=("on a party table", "in a bakery display", "on a glass stand",
                "next to paper lanterns"),
        writing=("in piped icing", "in swirling white icing", "in coloured sugar letters"),
        texts=("Happy Birthday {name}", "Well Done {name}", "Welcome Home {name}", "{number} Today",
               "Good Luck {name}", "Class Of {year}", "Farewell {name}", "{name} Said Yes",
               "Best Wishes", "Just Married", "Happy Anniversary", "You Did It", "Hooray",
               "Sweet Dreams", "With Love", "Eat Me First"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a yellow sticky note", "a folded paper note", "a torn notebook page",
                "a postcard"),
        places=("on a refrigerator door", "on a cluttered desk", "next to a cup of tea",
                "on a cork board"),
        writing=("in hurried blue handwriting", "in careful pencil", "in looping black ink"),
        texts=("Call {name} Back", "Feed The {pet}", "Back At {hour}", "Buy {fruit} Jam",
               "Dinner At {time}", "Lost {pet}", "Greetings From {town}", "{name} Was Here",
               "Dentist On {weekday}", "Do Not Forget", "Gone Fishing", "Sorry About The Vase",
               "Miss You Already", "Rent Is Due", "Look Behind You", "Smile"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a concert poster", "a vintage travel poster", "a circus poster", "a cloth banner"),
        places=("on a brick wall", "at a tram stop", "on a round advertising column",
                "in a market square"),
        writing=("in tall condensed letters", "in playful rounded letters", "in bold red type"),
        texts=("Visit {town}", "{town} Jazz Festival", "The {adjective} {animal}s",
               "{season} Market", "{surname} Quartet", "{town} Half Marathon", "Film Week {year}",
               "Circus {noun}", "Free Concert {weekday}", "One Night Only", "Sold Out",
               "Vote Tomorrow", "Flea Market", "Open Air Opera", "Final Week",
               "Fly By Night Train"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a laptop screen", "an old computer monitor", "a phone display",
                "a scratched tablet"),
        places=("on a tidy desk", "in a dark basement", "among tangled cables",
                "in a small workshop"),
        writing=("in green monospaced letters", "in clean white type", "in chunky pixel letters"),
        texts=("Battery {number} Percent", "{number} New Messages", "Level {number} Complete",
               "Good Morning {name}", "Score {number}00", "Player {name} Ready",
               "Build {number} Failed", "Alarm At {time}", "Insert Disk {letter}", "Game Over",
               "Access Denied", "Signal Lost", "Update Ready", "Press Any Key", "Please Wait",
               "Connection Secure"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a station sign", "a departure board", "the front of a tram",
                "a metal platform sign"),
        places=("in a vaulted railway hall", "at a windy coastal stop", "at a crowded terminal",
                "in a small mountain station"),
        writing=("in white block letters", "in glowing orange dots", "in black split-flap letters"),
        texts=("Platform {number}", "{town} Central", "{town} {time}", "Express To {town}",
               "Gate {letter}{number}", "Line {letter} To {town}", "Last Train {time}",
               "Night Bus {number}", "Delayed", "Mind The Step", "Not In Service", "All Aboard",
               "Way Out", "Lost Property", "Boarding Now", "Tickets Please"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a labelled jam jar", "a dark glass bottle", "a round tea tin",
                "a paper coffee bag"),
        places=("on a kitchen shelf", "on a market stall", "on a marble counter",
                "in a wicker basket"),
        writing=("in small letterpress type", "in elegant italic type", "in rough stamped letters"),
        texts=("{fruit} Jam", "{surname} Honey", "{town} Black Tea", "{fruit} Marmalade",
               "{adjective} {animal} Coffee", "{flower} Syrup", "Bottled In {month}",
               "Batch {number}", "Since {year}", "Sea Salt", "Extra Strong", "Shake Well",
               "Handle With Care", "Drink Me", "Wild Thyme", "Pure Vanilla"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a grey T-shirt", "a knitted jumper", "a canvas tote bag", "a denim jacket"),
        places=("on a wooden hanger", "on an unmade bed", "on a clothes line", "in a thrift shop"),
        writing=("in faded printed letters", "in neat embroidery", "in stitched red felt letters"),
        texts=("Team {name}", "{town} Rowing Club", "{town} {year}", "Made In {month}",
               "Save The {animal}", "Powered By {fruit} Pie", "{adjective} Since {year}",
               "{weekday} Is Cancelled", "Stay Curious", "Not Today", "Ask Me Later",
               "Plant More Trees", "Weekend Mode", "Slow And Steady", "Slightly Burnt",
               "Read More"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a mural", "a concrete wall", "a rolling garage door", "a rusty freight wagon"),
        places=("in a city side street", "under a railway bridge", "behind a skate park",
                "in an old harbour"),
        writing=("in bright spray paint", "in huge dripping letters", "in layered stencil letters"),
        texts=("Love {town}", "{season} Again", "More {virtue}", "{name} Loves {flower}",
               "Free The {animal}s", "{town} Forever", "No More {weekday}s", "{adjective} Youth",
               "Dream Louder", "Look Up", "We Were Here", "Paint The Town", "Nothing Is Fixed",
               "Breathe", "Rise", "Colour Is Free"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a bronze plaque", "a weathered stone slab", "a marble archway",
                "an old milestone"),
        places=("in an ivy-covered courtyard", "on a windy hilltop", "at the entrance of a museum",
                "beside a slow river"),
        writing=("in chiselled capitals", "in raised metal letters", "in worn Roman letters"),
        texts=("Built In {year}", "{surname} Hall", "In Memory Of {name}", "{town} Observatory",
               "{surname} Bridge {year}", "{virtue} Above All", "Temple Of {virtue}",
               "Here Sleeps {name} {surname}", "Rest A While", "Know Thyself", "To Those At Sea",
               "Speak Softly", "Flood Level {year}", "Public Library", "Enter In Silence"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("the hull of a spaceship", "a robot's chest plate", "an airlock door",
                "a lunar rover"),
        places=("in a vast hangar", "on a dusty red plain", "above a ringed planet",
                "in a cluttered repair bay"),
        writing=("in stencilled white letters", "in glowing cyan letters",
                 "in scuffed yellow letters"),
        texts=("Unit {number}", "Sector {letter}{number}", "Mission {noun}", "Project {animal}",
               "Cargo Bay {number}", "Colony {noun}", "Star Ship {adjective}", "Captain {surname}",
               "Oxygen Low", "High Voltage", "No Step", "Do Not Open", "Gravity Off", "Repair Me",
               "Earth Or Bust", "Eject"),
        lights=("in harsh directional light", "with a field of stars behind it",
                "in a cold blue glow", "with sparks and drifting dust", "in cinematic lighting"),
    ),
    Setting(
        things=("a treasure map", "an unrolled parchment scroll", "a spell book",
                "a wax-sealed letter"),
        places=("on a pirate captain's table", "in a wizard's study", "in an open wooden chest",
                "on a mossy stone altar"),
        writing=("in faded brown ink", "in ornate medieval lettering", "in spidery silver script"),
        texts=("The {noun} Isle", "Here Be {animal}s", "The {adjective} Kingdom",
               "Potion Of {virtue}", "Beware The {adjective} {animal}", "Cave Of {virtue}",
               "Oath Of {name}", "The Road To {town}", "Dig Here", "Burn This Letter",
               "Open At Dusk", "By Royal Decree", "Ten Paces North", "Speak No Lies",
               "Dragon Feeding Hours"),
        lights=INDOOR_LIGHT,
    ),
    Setting(
        things=("a small wooden sign", "a trail marker", "a painted fence board", "a tin notice"),
        places=("in a community garden", "at the gate of a farm", "on a forest path",
                "by a quiet lake"),
        writing=("in uneven white paint", "in burnt-in letters", "in cheerful green letters"),
        texts=("{animal} Trail", "Do Not Feed The {animal}s", "{flower} Garden", "{fruit} Orchard",
               "Beware Of The {pet}", "Fresh Eggs {price}", "Trail {number} Loop", "Camp {noun}",
               "Summit {number}0 m", "Keep Off The Grass", "Please Shut The Gate", "Wet Paint",
               "Picnic Area", "Deep Water", "Pick Your Own", "Bees At Work"),
        lights=DAYLIGHT,
    ),
    Setting(
        things=("a whiteboard", "a flip chart", "a paper wall chart", "a hand-lettered banner"),
        places=("in a sunny classroom", "in an empty lecture hall", "in a busy office", "in a gym"),
        writing=("in thick blue marker", "in tidy red capitals", "in rainbow-coloured letters"),
        texts=("Exam At {time}", "Chapter {number}", "Welcome {name}", "Quiz On {weekday}",
               "Lesson On {virtue}", "Group {letter} Wins", "{month} Goals", "Ask {name} First",
               "{animal} Class", "No Homework", "Silence Please", "Think Twice", "Ideas Welcome",
               "Show Your Work", "Question Everything", "Go Team"),
        lights=INDOOR_LIGHT,
    ),
)
# fmt: on


def records(count: int, seed: int) -> list[Record]:
    """Generate ``count`` prompts with different texts, from each setting in turn.

    A smaller count gives a prefix of a larger one.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    streams = [_texts(setting, rng) for setting in SETTINGS]
    found: list[Record] = []
    while len(found) < count:
        setting, stream = SETTINGS[len(found) % len(SETTINGS)], streams[len(found) % len(SETTINGS)]
        text = next((t for t in stream if _as_read(t) not in taken), None)
        if text is None:
            raise ValueError(f"the word lists only give {len(found)} prompts, not {count}")
        taken.add(_as_read(text))
        found.append({"prompt": _sentence(setting, text, rng), "metadata": {"text": text}})
    return found


def _as_read(text: str) -> str:
    """The text as an OCR reward compares it: lower case, without spaces."""
    return "".join(text.split()).lower()


def _texts(setting: Setting, rng: random.Random) -> Iterator[str]:
    """The texts of one setting in random order, with a limited number per pattern."""
    texts: list[str] = []
    for pattern in setting.texts:
        slots = [name for _, name, _, _ in string.Formatter().parse(pattern) if name]
        fillings = list(product(*(SLOTS[name] for name in slots)))
        for words in rng.sample(fillings, min(len(fillings), MAX_TEXTS_PER_PATTERN)):
            texts.append(pattern.format(**dict(zip(slots, words, strict=True))))
    rng.shuffle(texts)
    return iter(texts)


def _sentence(setting: Setting, text: str, rng: random.Random) -> str:
    """A prompt that asks for ``text`` in this setting."""
    sentence = rng.choice(SENTENCES).format(
        text=text,
        style=rng.choice(STYLES),
        thing=rng.choice(setting.things),
        place=rng.choice(setting.places),
        writing=rng.choice(setting.writing),
        light=rng.choice(setting.lights),
    )
    return ". ".join(part[0].upper() + part[1:] for part in sentence.split(". ")) + "."
