"""Reading comprehension made up from a seed, in SQuAD's v1.1 JSON.

A paragraph tells the same kinds of facts of several subjects: where each of three people was born, what each of them
plays. The type of a question therefore never gives its answer away: the right subject and the right fact have to be
found in the text, in other words than the question's. All names and values are shared by all paragraphs, so knowing
them does not help; which subjects stand together and what is said of them is new in every paragraph.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SUBJECT, VALUE = "{s}", "{v}"
COUNTS = {2: "two", 3: "three", 4: "four"}

WOMEN = """Ada Bella Clara Doris Edith Flora Greta Hanna Irene Julia Karin Laura Marta Nora Olga Paula Rosa Sofia Tilda
Vera""".split()
MEN = """Adam Boris Carl David Emil Felix Georg Henry Igor Jonas Kevin Leo Martin Nils Oscar Peter Ralph Simon Thomas
Victor""".split()
SURNAMES = """Adler Brandt Carter Doyle Ekman Fisher Garcia Hansen Ivanov Jensen Keller Larsen Moreno Novak Olsen Pavlik
Quinn Rossi Silva Tanner Unger Vogel Weaver Young Zeman Archer Barnes Conti Duval Evans""".split()
TOWNS = """Lisbon Porto Dublin Oslo Bergen Turin Genoa Lyon Nantes Vienna Graz Prague Brno Riga Tartu Malmo Ghent Basel
Bern Leeds York Bath Seville Toledo Krakow Gdansk Athens Zagreb Split Odense""".split()
JOBS = """baker barber butcher carpenter cook dentist doctor farmer fisherman gardener jeweller journalist judge lawyer
librarian nurse painter pilot plumber potter printer sculptor surgeon tailor teacher waiter""".split()
INSTRUMENTS = """violin cello flute oboe clarinet trumpet piano harp organ guitar banjo accordion trombone tuba
mandolin bassoon""".split()
SUBJECTS = """physics chemistry biology history law medicine botany geology music economics philosophy astronomy
theology geography statistics linguistics""".split()
LANGUAGES = """Danish Dutch Finnish French Greek Hindi Irish Latin Maltese Polish Russian Spanish Swedish Turkish Welsh
Arabic""".split()
FIRST_WORDS = """Orion Atlas Northern Golden Silver Summit Harbour Crescent Meridian Falcon Phoenix Granite Cedar Maple
Comet Anchor""".split()
LAST_WORDS = """Brothers Company Group Partners Works Holdings Industries Systems Trading Union""".split()
PRODUCTS = """bicycles clocks candles carpets paper soap shoes lamps engines tractors furniture ropes tools toys gloves
bricks umbrellas kettles""".split()
ADJECTIVES = """Silent Broken Hidden Distant Crooked Burning Frozen Narrow Wandering Empty Scarlet Midnight Forgotten
Quiet Hollow Wooden""".split()
NOUNS = """Garden River Letter Mirror Window Bridge Island Station Orchard Lantern Valley Stranger Promise Staircase
Harvest Compass""".split()
THEMES = """revenge jealousy friendship exile greed smuggling war shipwreck marriage espionage blackmail loneliness
emigration betrayal kidnapping rivalry""".split()
SHIPS = """Aurora Neptune Pelican Victoria Albatross Mercury Swallow Endeavour Triton Hercules Marigold Dolphin Juno
Corsair Minerva Pegasus""".split()
CARGOES = """coal timber grain salt wool copper coffee sugar cotton marble tea rubber cement bananas whisky tin""".split()
KINDS = """tiger otter lynx penguin gorilla camel zebra panther flamingo walrus tortoise jaguar leopard bison badger
vulture""".split()
PETS = """Bruno Coco Daisy Fido Ginger Hugo Jasper Kiki Lulu Max Nemo Oreo Pepper Rufus Sunny Toby""".split()
FOODS = """carrots apples herring melons cabbage berries peanuts spinach turnips grapes shrimps lettuce pumpkins beetles
pears mussels""".split()
BUILDINGS = ("Bridge", "Theatre", "Museum", "Tower", "Library", "Hall", "Palace", "Chapel")
MATERIALS = """granite marble brick oak steel concrete sandstone limestone slate glass timber iron""".split()


def _person(rng: random.Random) -> str:
    return f"{rng.choice(WOMEN + MEN)} {rng.choice(SURNAMES)}"


def _company(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_WORDS)} {rng.choice(LAST_WORDS)}"


def _novel(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _building(rng: random.Random) -> str:
    return f"{rng.choice(SURNAMES)} {rng.choice(BUILDINGS)}"


def _year(rng: random.Random) -> str:
    return str(rng.randint(1900, 1999))


def _number(rng: random.Random) -> str:
    return str(rng.randint(11, 99))


@dataclass(frozen=True)
class Relation:
    """
    One kind of fact.

    Args:
        values (`tuple | Callable`): What to draw the fact's value from.
        statements (`tuple[str, ...]`): Clauses with the subject `{s}` and the value `{v}`.
        questions (`tuple[str, ...]`): Ask for the value, given `{s}`.
        reverse (`tuple[str, ...]`): Ask for the subject, given `{v}`.
    """

    values: Any
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reverse: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topic:
    """
    What a paragraph may be about.

    Args:
        names (`tuple | Callable`): What to draw the subjects from.
        openers (`tuple[str, ...]`): First sentences; `{n}` is the number of subjects, `{t}` a town.
        relations (`tuple[Relation, ...]`): What may be told of a subject.
        article (`str`, *optional*, defaults to `""`): Stands before a name and is no part of it.
    """

    names: Any
    openers: tuple[str, ...]
    relations: tuple[Relation, ...]
    article: str = ""


PEOPLE = Topic(
    _person,
    (
        "The {t} choir has {n} new members.",
        "{n} guests spoke at the fair in {t}.",
        "{n} old friends meet in {t} every summer.",
        "A newspaper in {t} introduced {n} of its readers.",
    ),
    (
        Relation(
            TOWNS,
            ("{s} was born in {v}", "{s} is a native of {v}", "{s} comes from {v}"),
            ("Where was {s} born?", "What is the birthplace of {s}?", "Which town does {s} come from?"),
            ("Who was born in {v}?", "Who comes from {v}?"),
        ),
        Relation(
            TOWNS,
            ("{s} lives in {v}", "{s} has a house in {v}", "{s} settled in {v}"),
            ("Where does {s} live?", "In which town is the home of {s}?", "Where did {s} settle?"),
            ("Who lives in {v}?", "Who has a home in {v}?"),
        ),
        Relation(
            _year,
            ("{s} was born in {v}", "{v} is the year in which {s} was born", "{s} came into the world in {v}"),
            ("When was {s} born?", "In which year was {s} born?", "What is the year of birth of {s}?"),
            ("Who was born in {v}?",),
        ),
        Relation(
            JOBS,
            ("{s} works as a {v}", "{s} is a {v} by trade", "{s} earns a living as a {v}"),
            ("What is the job of {s}?", "What does {s} do for a living?", "What does {s} work as?"),
            ("Who is the {v}?", "Who works as a {v}?"),
        ),
        Relation(
            _company,
            ("{s} is employed by {v}", "{s} has a post at {v}", "{s} is on the staff of {v}"),
            ("Who employs {s}?", "Which company is the employer of {s}?", "Where does {s} have a post?"),
            ("Who is employed by {v}?", "Who belongs to the staff of {v}?"),
        ),
        Relation(
            INSTRUMENTS,
            ("{s} plays the {v}", "{s} gives lessons on the {v}", "{s} owns an old {v}"),
            ("Which instrument does {s} have?", "What does {s} play?", "What instrument is {s} heard on?"),
            ("Who plays the {v}?", "Who is heard on the {v}?"),
        ),
        Relation(
            SUBJECTS,
            ("{s} studied {v}", "{s} holds a degree in {v}", "{s} read {v} at university"),
            ("What did {s} study?", "In which subject does {s} hold a degree?", "What was {s} taught at university?"),
            ("Who studied {v}?", "Who holds a degree in {v}?"),
        ),
        Relation(
            LANGUAGES,
            ("{s} speaks {v}", "{s} is fluent in {v}", "{s} learned {v} as a child"),
            ("Which language does {s} speak?", "What language is {s} fluent in?", "Which tongue did {s} learn?"),
            ("Who speaks {v}?", "Who is able to talk in {v}?"),
        ),
    ),
)

COMPANIES = Topic(
    _company,
    (
        "{n} firms share a warehouse near {t}.",
        "{n} companies won a prize in {t} this year.",
        "The chamber of commerce in {t} praised {n} firms.",
    ),
    (
        Relation(
            _year,
            ("{s} was founded in {v}", "{s} was set up in {v}", "{s} has been in business since {v}"),
            ("When was {s} founded?", "In which year did {s} start?", "Since when has {s} been in business?"),
            ("Which company was founded in {v}?", "Which firm started in {v}?"),
        ),
        Relation(
            TOWNS,
            ("{s} is based in {v}", "{s} has its head office in {v}", "{s} is run from {v}"),
            ("Where is {s} based?", "In which town is the head office of {s}?", "Where is {s} run from?"),
            ("Which company is based in {v}?", "Which firm has its head office in {v}?"),
        ),
        Relation(
            PRODUCTS,
            ("{s} makes {v}", "{s} is known for its {v}", "{s} produces {v}"),
            ("What does {s} make?", "What is {s} known for?", "Which goods does {s} produce?"),
            ("Which company makes {v}?", "Who produces {v}?"),
        ),
        Relation(
            _person,
            ("{s} is led by {v}", "{s} belongs to {v}", "{v} is in charge of {s}"),
            ("Who leads {s}?", "Who is in charge of {s}?", "Who is the owner of {s}?"),
            ("Which company does {v} lead?", "Which firm is {v} in charge of?"),
        ),
        Relation(
            _number,
            ("{s} employs {v} people", "{s} has a staff of {v}", "{s} gives work to {v} people"),
            ("How many people does {s} employ?", "How large is the staff of {s}?"),
            ("Which company has a staff of {v}?", "Which firm employs {v} people?"),
        ),
    ),
)

NOVELS = Topic(
    _novel,
    (
        "The library in {t} bought {n} novels.",
        "{n} novels are on show in {t}.",
        "A reading club in {t} chose {n} novels.",
    ),
    (
        Relation(
            _person,
            ("{s} was written by {v}", "{s} is a work of {v}", "{v} is the author of {s}"),
            ("Who wrote {s}?", "Who is the author of {s}?", "From whose pen is {s}?"),
            ("What did {v} write?", "Which novel is by {v}?"),
        ),
        Relation(
            _year,
            ("{s} appeared in {v}", "{s} was published in {v}", "{s} was first printed in {v}"),
            ("When did {s} appear?", "In which year was {s} published?", "When was {s} first printed?"),
            ("Which novel appeared in {v}?", "What was published in {v}?"),
        ),
        Relation(
            TOWNS,
            ("{s} is set in {v}", "{s} takes place in {v}", "{s} plays out in {v}"),
            ("Where is {s} set?", "In which town does {s} take place?", "Where does the plot of {s} play out?"),
            ("Which novel is set in {v}?", "Which plot takes place in {v}?"),
        ),
        Relation(
            THEMES,
            ("{s} is about {v}", "{s} tells a story of {v}", "{s} deals with {v}"),
            ("What is {s} about?", "What is the theme of {s}?", "What does {s} deal with?"),
            ("Which novel is about {v}?", "Which book deals with {v}?"),
        ),
        Relation(
            LANGUAGES,
            ("{s} was translated into {v}", "{s} can be read in {v}", "{s} is also sold in {v}"),
            ("Into which language was {s} translated?", "In which language can {s} be read too?"),
            ("Which novel was translated into {v}?", "What can be read in {v}?"),
        ),
    ),
    article="The ",
)

SHIPPING = Topic(
    SHIPS,
    (
        "{n} ships lay in the harbour of {t}.",
        "{n} ships left {t} before the storm.",
        "The port of {t} expects {n} ships.",
    ),
    (
        Relation(
            TOWNS,
            ("{s} was built in {v}", "{s} came from a yard in {v}", "{s} was made by builders in {v}"),
            ("Where was {s} built?", "In which town is the yard that made {s}?"),
            ("Which ship was built in {v}?", "Which vessel came from a yard in {v}?"),
        ),
        Relation(
            TOWNS,
            ("{s} is bound for {v}", "{s} is on its way to {v}", "{s} is sailing to {v}"),
            ("Where is {s} bound for?", "What is the destination of {s}?", "Where is {s} sailing to?"),
            ("Which ship is bound for {v}?", "Which vessel is on its way to {v}?"),
        ),
        Relation(
            _year,
            ("{s} was launched in {v}", "{s} has been at sea since {v}", "{s} made its first voyage in {v}"),
            ("When was {s} launched?", "In which year was the first voyage of {s}?", "Since when is {s} at sea?"),
            ("Which ship was launched in {v}?", "Which vessel is at sea since {v}?"),
        ),
        Relation(
            _person,
            ("{s} is commanded by {v}", "{s} has {v} as its captain", "{v} is the captain of {s}"),
            ("Who commands {s}?", "Who is the captain of {s}?", "Under whose orders does {s} sail?"),
            ("Which ship does {v} command?", "Of which vessel is {v} the captain?"),
        ),
        Relation(
            CARGOES,
            ("{s} carries {v}", "{s} is loaded with {v}", "{s} has a hold full of {v}"),
            ("What does {s} carry?", "What is {s} loaded with?", "What is in the hold of {s}?"),
            ("Which ship carries {v}?", "Which vessel is loaded with {v}?"),
        ),
        Relation(
            _number,
            ("{s} is {v} metres long", "{s} measures {v} metres", "{s} has a length of {v} metres"),
            ("How long is {s}?", "How many metres does {s} measure?", "What is the length of {s}?"),
            ("Which ship is {v} metres long?", "Which vessel measures {v} metres?"),
        ),
    ),
    article="the ",
)

ZOO = Topic(
    PETS,
    (
        "The zoo in {t} has {n} favourites.",
        "Children in {t} voted for {n} animals of the zoo.",
        "{n} animals arrived at the zoo in {t}.",
    ),
    (
        Relation(
            KINDS,
            ("{s} is a {v}", "{s} belongs to the {v} family", "{s} is a fully grown {v}"),
            ("What kind of animal is {s}?", "Which animal is {s}?", "What is {s}?"),
            ("Who is the {v}?", "What is the name of the {v}?"),
        ),
        Relation(
            FOODS,
            ("{s} eats {v}", "{s} is fed on {v}", "{s} is fond of {v}"),
            ("What does {s} eat?", "What is {s} fed on?", "What does {s} like?"),
            ("Which animal eats {v}?", "Who likes {v}?"),
        ),
        Relation(
            _person,
            ("{s} is looked after by {v}", "{s} trusts {v} only", "{v} is the keeper of {s}"),
            ("Who looks after {s}?", "Who is the keeper of {s}?", "Whom does {s} trust?"),
            ("Which animal is looked after by {v}?", "Which animal trusts {v}?"),
        ),
        Relation(
            _number,
            ("{s} is {v} years old", "{s} has reached the age of {v}", "{s} is aged {v}"),
            ("How old is {s}?", "What is the age of {s}?", "What age has {s} reached?"),
            ("Which animal is {v} years old?", "Who has reached the age of {v}?"),
        ),
        Relation(
            TOWNS,
            ("{s} was born in {v}", "{s} was a gift from {v}", "{s} came from {v}"),
            ("Where was {s} born?", "From which town did {s} come?", "Where is {s} from?"),
            ("Which animal came from {v}?", "Which animal was born in {v}?"),
        ),
    ),
)

ARCHITECTURE = Topic(
    _building,
    (
        "{n} landmarks draw visitors to {t}.",
        "A guide from {t} described {n} landmarks.",
        "{n} landmarks are being repaired by a firm from {t}.",
    ),
    (
        Relation(
            _person,
            ("{s} was designed by {v}", "{s} was planned by {v}", "{v} is the architect of {s}"),
            ("Who designed {s}?", "Who is the architect of {s}?", "Who drew the plans of {s}?"),
            ("What did {v} design?", "Of which landmark is {v} the architect?"),
        ),
        Relation(
            _year,
            ("{s} was opened in {v}", "{s} was finished in {v}", "{s} has stood since {v}"),
            ("When was {s} opened?", "In which year was {s} finished?", "Since when has {s} stood?"),
            ("Which landmark was opened in {v}?", "What was finished in {v}?"),
        ),
        Relation(
            MATERIALS,
            ("{s} is built of {v}", "{s} is made of {v}", "{s} consists of {v}"),
            ("What is {s} built of?", "Of which material is {s} made?", "What does {s} consist of?"),
            ("Which landmark is built of {v}?", "What is made of {v}?"),
        ),
        Relation(
            _number,
            ("{s} is {v} metres high", "{s} rises {v} metres", "{s} has a height of {v} metres"),
            ("How high is {s}?", "How many metres does {s} rise?", "What is the height of {s}?"),
            ("Which landmark is {v} metres high?", "What rises {v} metres?"),
        ),
        Relation(
            _company,
            ("{s} was paid for by {v}", "{s} is the property of {v}", "{s} is owned by {v}"),
            ("Who paid for {s}?", "Who is the owner of {s}?", "Whose property is {s}?"),
            ("What is owned by {v}?", "Which landmark did {v} pay for?"),
        ),
    ),
    article="the ",
)

TOPICS = (PEOPLE, COMPANIES, NOVELS, SHIPPING, ZOO, ARCHITECTURE)


@dataclass(frozen=True)
class Fact:
    """Something that a paragraph says, with the characters at which its two ends stand."""

    relation: Relation
    subject: str
    subject_start: int
    value: str
    value_start: int


class Writer:
    """Strings sentences together and remembers where names and values stand."""

    def __init__(self) -> None:
        self.text = ""
        self.starts: dict[str, int] = {}

    def sentence(self, *pieces: tuple[str, bool]) -> None:
        """Add a sentence. Pieces are texts, each with whether to remember where it starts."""
        start = len(self.text) + bool(self.text)
        sentence = ""
        for text, remembered in pieces:
            if remembered:
                self.starts[text] = start + len(sentence)
            sentence += text
        self.text += f"{' ' if self.text else ''}{sentence[0].upper()}{sentence[1:]}."


def write_paragraph(topic: Topic, rng: random.Random, subjects: int) -> tuple[str, list[Fact], tuple[str, ...]]:
    """A paragraph on `subjects` subjects, what it says, and of whom."""
    taken: set[str] = set()
    names = tuple(draw(topic.names, rng, taken) for _ in range(subjects))
    relations = rng.sample(topic.relations, rng.choice((2, 3)))
    writer = Writer()
    opener = rng.choice(topic.openers).format(n=COUNTS[subjects], t=draw(TOWNS, rng, taken))
    writer.sentence((opener.rstrip("."), False))
    told = []
    for name in names:
        told += [(relation, name, draw(relation.values, rng, taken)) for relation in relations]
        facts = told[-len(relations) :]
        rng.shuffle(facts)
        write_facts(writer, topic, facts, rng)
    starts = writer.starts
    facts = [Fact(relation, name, starts[name], value, starts[value]) for relation, name, value in told]
    return writer.text, facts, names


def draw(pool: Any, rng: random.Random, taken: set[str]) -> str:
    """A value that shares no word with those that the paragraph has."""
    while True:
        value = pool(rng) if callable(pool) else rng.choice(pool)
        if taken.isdisjoint(value.split()):
            taken.update(value.split())
            return value


def write_facts(writer: Writer, topic: Topic, facts: list[tuple[Relation, str, str]], rng: random.Random) -> None:
    """Say all of one subject: by its name first, then by a pronoun."""
    name = facts[0][1]
    first = name.split()[0]
    pronoun = "it" if topic is not PEOPLE and topic is not ZOO else "she" if first in WOMEN else "he"
    mention = [(topic.article, False), (name, True)]
    pieces: list[tuple[str, bool]] = []
    joinable = False
    for position, (relation, _, value) in enumerate(facts):
        # What begins with the value cannot do with a pronoun, and nothing can be joined to it.
        clauses = [clause for clause in relation.statements if clause.startswith(SUBJECT) or not position]
        clause = rng.choice(clauses)
        joined = joinable and rng.random() < 0.5
        if joined:
            pieces.append((" and ", False))
            clause = clause.removeprefix(f"{SUBJECT} ")
        elif pieces:
            writer.sentence(*pieces)
            pieces = []
        joinable = clause.startswith(SUBJECT)
        for piece in re.split(r"(\{[sv]\})", clause):
            if piece == SUBJECT:
                pieces += mention
                mention = [(pronoun, False)]
            elif piece == VALUE:
                pieces.append((value, True))
            elif piece:
                pieces.append((piece, False))
    writer.sentence(*pieces)


def ask(topic: Topic, fact: Fact, rng: random.Random) -> tuple[str, str, int]:
    """A question on a fact, its answer, and where in the paragraph that starts."""
    if fact.relation.reverse and rng.random() < 0.3:
        return rng.choice(fact.relation.reverse).format(v=fact.value), fact.subject, fact.subject_start
    question = rng.choice(fact.relation.questions).format(s=topic.article + fact.subject)
    return question, fact.value, fact.value_start


def paragraphs(rng: random.Random, questions: int) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Endless paragraphs of SQuAD's form, no two with the same subjects, each with its subjects' names."""
    seen: set[frozenset[str]] = set()
    while True:
        topic = rng.choice(TOPICS)
        text, facts, names = write_paragraph(topic, rng, rng.choice((2, 3, 3)))
        if frozenset(names) in seen:
            continue
        seen.add(frozenset(names))
        qas = []
        for fact in rng.sample(facts, min(questions, len(facts))):
            question, answer, start = ask(topic, fact, rng)
            qas.append({"question": question, "answers": [{"text": answer, "answer_start": start}]})
        yield names, {"context": text, "qas": qas}
