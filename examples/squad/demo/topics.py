"""What `synthetic.py` writes about: words, kinds of facts, and how they are told and asked for."""

from dataclasses import dataclass

Pool = tuple[tuple[str, ...], ...]  # a name or value is made of one word of each


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    """Ada Bella Clara Doris Edith Flora Greta Hanna Irene Julia Karin Laura Marta Nora Olga Paula Rosa Sofia Tilda
    Vera"""
)
MEN = _words(
    """Adam Boris Carl David Emil Felix Georg Henry Igor Jonas Kevin Leo Martin Nils Oscar Peter Ralph Simon Thomas
    Victor"""
)
SURNAMES = _words(
    """Adler Brandt Carter Doyle Ekman Fisher Garcia Hansen Ivanov Jensen Keller Larsen Moreno Novak Olsen Pavlik
    Quinn Rossi Silva Tanner Unger Vogel Weaver Young Zeman Archer Barnes Conti Duval Evans"""
)
TOWN = _words("Athens Basel Bath Bern Brno Graz Krakow Leeds Lyon Prague Seville Toledo Turin Vienna York Zagreb")
PORT = _words("Aarhus Bergen Cork Dover Dublin Gdansk Genoa Lisbon Malmo Naples Odense Oslo Porto Riga Split Trieste")
JOB = _words(
    """baker barber butcher carpenter cook dentist doctor farmer fisherman gardener jeweller journalist judge lawyer
    librarian nurse painter pilot plumber potter printer sculptor surgeon tailor teacher waiter"""
)
INSTRUMENT = _words(
    """violin cello flute oboe clarinet trumpet piano harp organ guitar banjo accordion trombone tuba mandolin
    bassoon"""
)
SUBJECT_OF_STUDY = _words(
    """physics chemistry biology history law medicine botany geology music economics philosophy astronomy theology
    geography statistics linguistics"""
)
LANGUAGE = _words(
    """Danish Dutch Finnish French Greek Hindi Irish Latin Maltese Polish Russian Spanish Swedish Turkish Welsh
    Arabic"""
)
FIRST_WORDS = _words(
    """Orion Atlas Northern Golden Silver Summit Harbour Crescent Meridian Falcon Phoenix Granite Cedar Maple Comet
    Anchor"""
)
LAST_WORDS = _words("Brothers Company Group Partners Works Holdings Industries Systems Trading Union")
PRODUCT = _words(
    """bicycles clocks candles carpets paper soap shoes lamps engines tractors furniture ropes tools toys gloves
    bricks umbrellas kettles"""
)
ADJECTIVES = _words(
    """Silent Broken Hidden Distant Crooked Burning Frozen Narrow Wandering Empty Scarlet Midnight Forgotten Quiet
    Hollow Wooden"""
)
NOUNS = _words(
    """Garden River Letter Mirror Window Bridge Island Station Orchard Lantern Valley Stranger Promise Staircase
    Harvest Compass"""
)
THEME = _words(
    """revenge jealousy friendship exile greed smuggling war shipwreck marriage espionage blackmail loneliness
    emigration betrayal kidnapping rivalry"""
)
SHIP_WORDS = _words("Brave Eastern Grand Lucky Merry Noble Northern Proud Royal Southern Swift Western")
SHIP_NAMES = _words(
    """Aurora Neptune Pelican Victoria Albatross Mercury Swallow Endeavour Triton Hercules Marigold Dolphin Juno
    Corsair Minerva Pegasus"""
)
CARGO = _words("coal timber grain salt wool copper coffee sugar cotton marble tea rubber cement bananas whisky tin")
SPECIES = _words(
    """tiger monkey lynx penguin gorilla camel zebra panther flamingo walrus tortoise jaguar leopard bison badger
    vulture"""
)
FEMALES = _words(
    """Bonnie Coco Daisy Dolly Duchess Fifi Ginger Honey Kiki Lulu Maggie Mimi Minnie Misty Molly Nala Penny Pepper
    Pippa Roxy Ruby Sunny Tess Trixie"""
)
MALES = _words(
    """Baloo Bingo Bruno Buddy Caesar Duke Fido Gus Hugo Jasper Jumbo Max Milo Monty Nemo Pongo Prince Rufus Samson
    Simba Toby Tucker Ziggy Zorro"""
)
FOOD = _words(
    """carrots apples herring melons cabbage berries peanuts spinach turnips grapes shrimps lettuce pumpkins beetles
    pears mussels"""
)
BUILDINGS = _words("Bridge Theatre Museum Tower Library Hall Palace Chapel")
MATERIAL = _words("granite marble brick oak steel concrete sandstone limestone slate glass timber iron")

YEAR = tuple(map(str, range(1900, 2000)))
AGE = tuple(map(str, range(2, 31)))
NUMBER = tuple(map(str, range(11, 100)))
PERSON = (WOMEN + MEN, SURNAMES)
COMPANY = (FIRST_WORDS, LAST_WORDS)
NOVEL = (ADJECTIVES, NOUNS)
BUILDING = (SURNAMES, BUILDINGS)
SHIP = (SHIP_WORDS, SHIP_NAMES)


@dataclass(frozen=True)
class Relation:
    """
    One kind of fact.

    Args:
        values (`Pool`): What to draw the fact's value from.
        statements (`tuple[str, ...]`): Clauses with the subject `{s}` and the value `{v}`.
        questions (`tuple[str, ...]`): Ask for the value, given `{s}`.
    """

    values: Pool
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """
    What a paragraph may be about.

    Args:
        names (`Pool`): What to draw the subjects from.
        openers (`tuple[str, ...]`): First sentences; `{n}` is the number of subjects, `{t}` a town.
        relations (`tuple[Relation, ...]`): What may be told of a subject.
        article (`str`, *optional*, defaults to `""`): Stands before a name and is no part of it.
    """

    names: Pool
    openers: tuple[str, ...]
    relations: tuple[Relation, ...]
    article: str = ""


PEOPLE = Topic(
    PERSON,
    (
        "The {t} choir has {n} new members",
        "{n} guests spoke at the fair in {t}",
        "{n} old friends meet in {t} every summer",
        "A newspaper in {t} introduced {n} of its readers",
    ),
    (
        Relation(
            (TOWN,),
            ("{s} was born in {v}", "{s} is a native of {v}", "{s} comes from {v}"),
            ("Where was {s} born?", "What is the birthplace of {s}?", "Which town does {s} come from?"),
        ),
        Relation(
            (TOWN,),
            ("{s} lives in {v}", "{s} has a house in {v}", "{s} settled in {v}"),
            ("Where does {s} live?", "In which town is the home of {s}?", "Where did {s} settle?"),
        ),
        Relation(
            (YEAR,),
            ("{s} was born in {v}", "{s} was born in the year {v}", "{s} came into the world in {v}"),
            ("When was {s} born?", "In which year was {s} born?", "What is the year of birth of {s}?"),
        ),
        Relation(
            (JOB,),
            ("{s} works as a {v}", "{s} is a {v} by trade", "{s} earns a living as a {v}"),
            ("What is the job of {s}?", "What does {s} do for a living?", "What does {s} work as?"),
        ),
        Relation(
            COMPANY,
            ("{s} is employed by {v}", "{s} has a post at {v}", "{s} is on the staff of {v}"),
            ("Who employs {s}?", "Which company is the employer of {s}?", "Where does {s} have a post?"),
        ),
        Relation(
            (INSTRUMENT,),
            ("{s} plays the {v}", "{s} gives lessons on the {v}", "{s} performs on the {v}"),
            ("Which instrument does {s} play?", "What does {s} play?", "On what instrument is {s} heard?"),
        ),
        Relation(
            (SUBJECT_OF_STUDY,),
            ("{s} studied {v}", "{s} holds a degree in {v}", "{s} read {v} at university"),
            ("What did {s} study?", "In which subject does {s} hold a degree?", "What was {s} taught at university?"),
        ),
        Relation(
            (LANGUAGE,),
            ("{s} speaks {v}", "{s} is fluent in {v}", "{s} learned {v} as a child"),
            ("Which language does {s} speak?", "What language is {s} fluent in?", "Which tongue did {s} learn?"),
        ),
    ),
)

COMPANIES = Topic(
    COMPANY,
    (
        "{n} firms share a warehouse near {t}",
        "{n} companies won a prize in {t} this year",
        "The chamber of commerce in {t} praised {n} firms",
    ),
    (
        Relation(
            (YEAR,),
            ("{s} was founded in {v}", "{s} was set up in {v}", "{s} has been in business since {v}"),
            ("When was {s} founded?", "In which year did {s} start?", "Since when has {s} been in business?"),
        ),
        Relation(
            (TOWN,),
            ("{s} is based in {v}", "{s} has its head office in {v}", "{s} is run from {v}"),
            ("Where is {s} based?", "In which town is the head office of {s}?", "Where is {s} run from?"),
        ),
        Relation(
            (PRODUCT,),
            ("{s} makes {v}", "{s} is known for its {v}", "{s} produces {v}"),
            ("What does {s} make?", "What is {s} known for?", "Which goods does {s} produce?"),
        ),
        Relation(
            PERSON,
            ("{s} is led by {v}", "{s} is managed by {v}"),
            ("Who leads {s}?", "Who is in charge of {s}?", "Who is the manager of {s}?"),
        ),
        Relation(
            (NUMBER,),
            ("{s} employs {v} people", "{s} has a staff of {v}", "{s} gives work to {v} people"),
            ("How many people does {s} employ?", "How large is the staff of {s}?"),
        ),
    ),
)

NOVELS = Topic(
    NOVEL,
    (
        "The library in {t} bought {n} novels",
        "{n} novels are on show in {t}",
        "A reading club in {t} chose {n} novels",
    ),
    (
        Relation(
            PERSON,
            ("{s} was written by {v}", "{s} is a work of {v}"),
            ("Who wrote {s}?", "Who is the author of {s}?", "From whose pen is {s}?"),
        ),
        Relation(
            (YEAR,),
            ("{s} appeared in {v}", "{s} was published in {v}", "{s} was first printed in {v}"),
            ("When did {s} appear?", "In which year was {s} published?", "When was {s} first printed?"),
        ),
        Relation(
            (TOWN,),
            ("{s} is set in {v}", "{s} takes place in {v}", "{s} plays out in {v}"),
            ("Where is {s} set?", "In which town does {s} take place?", "Where does the plot of {s} play out?"),
        ),
        Relation(
            (THEME,),
            ("{s} is about {v}", "{s} tells a story of {v}", "{s} deals with {v}"),
            ("What is {s} about?", "What is the theme of {s}?", "What does {s} deal with?"),
        ),
        Relation(
            (LANGUAGE,),
            ("{s} was translated into {v}", "{s} can be read in {v}", "{s} is also sold in {v}"),
            ("Into which language was {s} translated?", "In which language can {s} be read too?"),
        ),
    ),
    article="the ",
)

SHIPPING = Topic(
    SHIP,
    (
        "{n} ships lay in the harbour of {t}",
        "{n} ships left {t} before the storm",
        "The port of {t} expects {n} ships",
    ),
    (
        Relation(
            (PORT,),
            ("{s} was built in {v}", "{s} came from a yard in {v}", "{s} was made by builders in {v}"),
            ("Where was {s} built?", "In which port is the yard that made {s}?"),
        ),
        Relation(
            (PORT,),
            ("{s} is bound for {v}", "{s} is on its way to {v}", "{s} is sailing to {v}"),
            ("Where is {s} bound for?", "What is the destination of {s}?", "Where is {s} sailing to?"),
        ),
        Relation(
            (YEAR,),
            ("{s} was launched in {v}", "{s} has been at sea since {v}", "{s} made its first voyage in {v}"),
            ("When was {s} launched?", "When was the first voyage of {s}?", "Since when has {s} been at sea?"),
        ),
        Relation(
            PERSON,
            ("{s} is commanded by {v}", "{s} has {v} as its captain"),
            ("Who commands {s}?", "Who is the captain of {s}?", "Under whose orders is {s}?"),
        ),
        Relation(
            (CARGO,),
            ("{s} carries {v}", "{s} is loaded with {v}", "{s} has a hold full of {v}"),
            ("What does {s} carry?", "What is {s} loaded with?", "What is in the hold of {s}?"),
        ),
        Relation(
            (NUMBER,),
            ("{s} is {v} metres long", "{s} measures {v} metres", "{s} has a length of {v} metres"),
            ("How long is {s}?", "How many metres does {s} measure?", "What is the length of {s}?"),
        ),
    ),
    article="the ",
)

ZOO = Topic(
    (FEMALES + MALES,),
    (
        "The zoo in {t} has {n} favourites",
        "Children in {t} voted for {n} animals of the zoo",
        "{n} animals arrived at the zoo in {t}",
    ),
    (
        Relation(
            (SPECIES,),
            ("{s} is a {v}", "{s} is a tame {v}", "{s} is a fully grown {v}"),
            ("What kind of animal is {s}?", "Which animal is {s}?", "What is {s}?"),
        ),
        Relation(
            (FOOD,),
            ("{s} eats {v}", "{s} is fed on {v}", "{s} is fond of {v}"),
            ("What does {s} eat?", "What is {s} fed on?", "What does {s} like?"),
        ),
        Relation(
            PERSON,
            ("{s} is looked after by {v}", "{s} is in the care of {v}"),
            ("Who looks after {s}?", "Who is the keeper of {s}?", "In whose care is {s}?"),
        ),
        Relation(
            (AGE,),
            ("{s} is {v} years old", "{s} has reached the age of {v}", "{s} is aged {v}"),
            ("How old is {s}?", "What is the age of {s}?", "What age has {s} reached?"),
        ),
        Relation(
            (TOWN,),
            ("{s} was born in {v}", "{s} came into the world in {v}"),
            ("Where was {s} born?", "What is the birthplace of {s}?", "In which town was {s} born?"),
        ),
    ),
)

ARCHITECTURE = Topic(
    BUILDING,
    (
        "{n} landmarks draw visitors to {t}",
        "A guide from {t} described {n} landmarks",
        "{n} landmarks are being repaired by a firm from {t}",
    ),
    (
        Relation(
            PERSON,
            ("{s} was designed by {v}", "{s} was planned by {v}"),
            ("Who designed {s}?", "Who is the architect of {s}?", "Who drew the plans of {s}?"),
        ),
        Relation(
            (YEAR,),
            ("{s} was opened in {v}", "{s} was finished in {v}", "{s} has stood since {v}"),
            ("When was {s} opened?", "In which year was {s} finished?", "Since when has {s} stood?"),
        ),
        Relation(
            (MATERIAL,),
            ("{s} is built of {v}", "{s} is made of {v}", "{s} consists of {v}"),
            ("What is {s} built of?", "Of which material is {s} made?", "What does {s} consist of?"),
        ),
        Relation(
            (NUMBER,),
            ("{s} is {v} metres high", "{s} rises {v} metres", "{s} has a height of {v} metres"),
            ("How high is {s}?", "How many metres does {s} rise?", "What is the height of {s}?"),
        ),
        Relation(
            COMPANY,
            ("{s} belongs to {v}", "{s} is the property of {v}", "{s} is owned by {v}"),
            ("Which company owns {s}?", "Who is the owner of {s}?", "Whose property is {s}?"),
        ),
    ),
    article="the ",
)

TOPICS = (PEOPLE, COMPANIES, NOVELS, SHIPPING, ZOO, ARCHITECTURE)
