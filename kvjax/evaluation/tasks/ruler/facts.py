"""Documents of invented towns and people, and questions that one or two of them answer.

Nothing of it is true, so that no model knows an answer by heart; nothing of it is
anybody's, so that it may ship. Of SQuAD's and HotpotQA's questions these keep what a
cache is tried by: one document of many, or one that another names.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks.ruler.qa import Asked


def _words(text: str) -> list[str]:
    return text.split()


_STARTS = _words("""
Alder Amber Ash Barn Beck Birch Bram Brook Burn Carl Cedar Chal Clay Cold Cop Crow Dun
East Elm Fair Fen Fox Gar Glen Gold Green Hal Hazel Heath Hol Iron Kel King Lam Lind
Long Marl May Mid Mill Nor Oak Ors Peb Quar Raven Red Rook Rush Sel Shel Silver Stan
Stone Sun Swan Thorn Up Wal West Whit Wil Win Wood Yar
""")
_ENDS = _words("""
bourne bridge brook bury by combe cote croft dale den don field fold ford gate grove ham
haven hurst ley low mere mouth over port ridge side stead stow thorpe ton wald well wick
wold worth
""")
_FIRST = _words("""
Ada Agnes Alan Albert Alma Amos Anton Arthur Astrid Basil Beatrice Bela Bruno Carla
Cecil Clara Colin Cora Cyril Dora Edgar Edith Egon Elsa Emil Enid Ernest Esther Felix
Flora Frieda Georg Gilda Gordon Greta Gustav Hanna Hector Hilda Hugo Ida Igor Ines
Ingrid Ivan Jonas Judith Karin Kaspar Klara Lars Leonie Linus Lotte Magnus Marta Milo
Mina Nadia Nils Nora Olga Oscar Otto Paula Petra Quentin Ralph Rita Rufus Sibyl Sigrid
Simon Stella Tilda Tobias Ulla Ursula Viktor Vera Walter Wanda Xenia Yvonne Zoe
""")
_LAST = _words("""
Abbott Ackroyd Barlow Bellamy Birkett Bowen Calder Carver Chandler Cobb Cotter Dalton
Denham Draper Dyer Eastman Ellery Fairfax Falkner Fisher Fletcher Garner Gilbert Glover
Hadley Harper Hewitt Hooper Ingram Jarvis Kendall Keller Lambert Langley Lister Lovell
Marlow Mercer Milner Norris Oakley Osborn Palmer Parrish Pember Potter Quayle Radley
Rawlins Rowan Sadler Salter Shaw Spencer Tanner Thatcher Tyler Underhill Vance
Wainwright Walden Webster Wheeler Yardley
""")
_KNOWN_FOR = _words("""
bells barrels blankets boats boots bricks butter candles carpets carts cheese cider
clocks drums flutes glass gloves hats honey kites knives lace lanterns leather mirrors
mustard needles paper pears pencils pottery ropes saddles salt scales silk soap tiles
toys umbrellas violins wool
""")
_WORK = _words("""
baker beekeeper blacksmith bookbinder botanist carpenter chemist clockmaker cook dentist
engraver gardener geologist glazier journalist judge librarian locksmith mason painter
pilot plumber poet printer sailor sculptor singer surgeon tailor teacher weaver
""")
_DAYS = _words("Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays")

# What is asked of a town: the question, and the place of its answer in :class:`Town`.
_QUESTIONS = (
    ("Who is the mayor of {}?", "mayor"),
    ("In which year was {} founded?", "founded"),
    ("Which river runs through {}?", "river"),
)
_OF_THE_BIRTHPLACE = (
    ("Who is the mayor of the town where {} was born?", "mayor"),
    ("In which year was the town founded where {} was born?", "founded"),
    ("Which river runs through the town where {} was born?", "river"),
)


class Town(NamedTuple):
    """A town and what is to be known of it."""

    name: str
    mayor: str
    founded: str
    river: str
    made: str
    market: str
    people: str

    def document(self) -> str:
        """Returns the text on the town."""
        return (
            f"{self.name}\n{self.name} is a town on the river {self.river}. It was "
            f"founded in {self.founded} and has about {self.people} inhabitants. It is "
            f"known for its {self.made}, and has a market on {self.market}. "
            f"The mayor of {self.name} is {self.mayor}."
        )


def town_names(rng: np.random.Generator) -> Iterator[str]:
    """Yields different names of towns without end."""
    return _pairs(rng, _STARTS, _ENDS, "")


def _pairs(rng, first, second, between: str) -> Iterator[str]:
    """Yields every pair once, then pairs with a number behind them."""
    turn = 0
    while True:
        turn += 1
        for index in rng.permutation(len(first) * len(second)).tolist():
            one, other = divmod(index, len(second))
            suffix = f" {turn}" if turn > 1 else ""
            yield f"{first[one]}{between}{second[other]}{suffix}"


class _World:
    """Draws towns and people whose names differ."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.names = town_names(rng)
        self.people = _pairs(rng, _FIRST, _LAST, " ")

    def _pick(self, words) -> str:
        return words[int(self.rng.integers(len(words)))]

    def town(self) -> Town:
        """Returns a town of a name of its own."""
        return Town(
            next(self.names),
            next(self.people),
            str(self.rng.integers(1000, 1900)),
            self._pick(_STARTS) + self._pick(("a", "en", "et", "o")),
            self._pick(_KNOWN_FOR),
            self._pick(_DAYS),
            f"{self.rng.integers(12, 900)},000",
        )

    def person(self, birthplace: str) -> tuple[str, str]:
        """Returns a name, and the text on who bears it."""
        name, work = next(self.people), self._pick(_WORK)
        age, year = self.rng.integers(20, 90), self.rng.integers(1900, 2000)
        text = (
            f"{name}\n{name} is a {work} of {age} years who was born in {birthplace}. "
            f"Since {year} {name} has written a diary, which a museum keeps today."
        )
        return name, text


def one_document(rng: np.random.Generator, index: int, count: int) -> Asked:
    """Returns a question about a town, and `count` documents, its own the first."""
    del index  # there are as many questions as seeds
    world = _World(rng)
    town = world.town()
    question, answer = _asked(rng, _QUESTIONS, town)
    documents = [town.document()]
    while len(documents) < count:
        _add(documents, world.town().document(), answer)
    return Asked(question.format(town.name), (answer,), documents)


def two_documents(rng: np.random.Generator, index: int, count: int) -> Asked:
    """Returns a question about a person's birthplace, and `count` documents.

    The first is on the person and says where it was, the second on that town; of the
    others every second one is on a person, born in another town.
    """
    del index
    world = _World(rng)
    town = world.town()
    question, answer = _asked(rng, _OF_THE_BIRTHPLACE, town)
    name, text = world.person(town.name)
    documents = [text, town.document()]
    while len(documents) < count:
        other = world.town()
        _add(documents, world.person(other.name)[1], answer)
        _add(documents, other.document(), answer)
    return Asked(question.format(name), (answer,), documents[:count])


def _asked(rng, questions, town: Town) -> tuple[str, str]:
    question, field = questions[int(rng.integers(len(questions)))]
    return question, getattr(town, field)


def _add(documents: list[str], document: str, answer: str) -> None:
    """Adds a document, unless it says the answer too, of another town."""
    if answer.lower() not in document.lower():
        documents.append(document)
