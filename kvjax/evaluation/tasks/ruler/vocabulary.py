"""Words that keys and lists are made of: adjectives and nouns of our own choosing."""

from collections.abc import Iterator

import numpy as np

from kvjax.evaluation.tasks.words import WORDS

_LISTED = """
able absent active agile alert ample ancient ashen austere aware bare bashful bitter
blank bleak blond blunt bold bossy brave brief bright brisk broad bulky burly busy calm
candid careful casual cheap civil clean clear clever clumsy coarse cold common compact
cosy covert coy crisp crude cuddly curly curious damp daring dark dear deep dense dim
direct distant dizzy double drab dry dull dusty eager early earnest easy elder elegant
empty endless equal exact exotic faint fair faithful famous fancy fast fatal feeble
fertile festive fierce final firm fit flat fluent fluid fond formal frail frank free
fresh frosty fuzzy gaudy gentle giddy glad glossy grand grave greedy grim gritty
grumpy handy happy hardy harsh hasty hazy heavy hidden hoarse hollow honest humble
hungry icy ideal idle immense inner jagged jolly jovial keen kind lame large late
lavish lazy lean legal level light likely lively local lone loose loud loyal lucid
lucky mature meek mellow merry mighty mild minor misty modest moist muddy mute narrow
naval nearby neat nervous new nimble noble noisy novel numb odd opaque outer oval pale
patient perky placid plain polite poor prickly prim proper proud prudent quaint quick
quiet rapid rare raw ready recent regal remote rich rigid ripe robust rough round
royal rude rugged rustic sacred safe scarce secure serene severe shaggy shallow sharp
shiny short shy silent simple sincere sleek slender slim slow sly small smooth snug
sober soft solemn solid sour spare sparse spicy stark steady steep stern stiff still
stout strict strong sturdy subtle sudden sunny superb swift tall tame tardy tender
tense thick thin thirsty tidy tight timid tiny tough tranquil trusty vague valid vast
vital vivid warm wary weary wet whole wide wild wiry wise witty woolly worthy wry young
zealous
"""

ADJECTIVES: tuple[str, ...] = tuple(
    word for word in dict.fromkeys(_LISTED.split()) if word not in WORDS
)


def pair(rng: np.random.Generator) -> str:
    """Returns a key of two words, such as `quiet-lantern`."""
    first = ADJECTIVES[int(rng.integers(len(ADJECTIVES)))]
    return f"{first}-{WORDS[int(rng.integers(len(WORDS)))]}"


def words(rng: np.random.Generator) -> Iterator[str]:
    """Yields different words without end: nouns, adjectives, then pairs of them."""
    every = [*WORDS, *ADJECTIVES]
    for index in rng.permutation(len(every)).tolist():
        yield every[index]
    known = set()
    while True:
        key = pair(rng)
        if key not in known:
            known.add(key)
            yield key
