"""The demo's small world: facts about animals, things, places and numbers, told in six styles.

All the text that the demo's base and adapters learn comes from here. `train.py` samples it; nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Animal(NamedTuple):
    name: str
    french: str
    gender: str
    emoji: str
    sound: str
    french_sound: str
    home: str
    food: str


_ANIMALS = """
cat       chat        m 🐱 meow     miaou       house    fish
dog       chien       m 🐶 woof     ouaf        house    meat
cow       vache       f 🐮 moo      meuh        meadow   grass
duck      canard      m 🦆 quack    coin-coin   pond     seeds
horse     cheval      m 🐴 neigh    hiii        farm     hay
sheep     mouton      m 🐑 baa      bêê         meadow   grass
pig       cochon      m 🐷 oink     groin       farm     corn
owl       hibou       m 🦉 hoot     hou-hou     forest   mice
frog      grenouille  f 🐸 ribbit   coâ         pond     flies
bee       abeille     f 🐝 buzz     bzzz        hive     nectar
lion      lion        m 🦁 roar     groar       savanna  meat
wolf      loup        m 🐺 awoo     aouh        forest   meat
fox       renard      m 🦊 yip      wif         forest   berries
bear      ours        m 🐻 growl    grrr        forest   honey
fish      poisson     m 🐟 blub     bloup       sea      plankton
whale     baleine     f 🐳 woo      ouuu        sea      plankton
snake     serpent     m 🐍 hiss     sss         desert   mice
mouse     souris      f 🐭 squeak   couic       house    cheese
goat      chèvre      f 🐐 maa      mêê         meadow   hay
camel     chameau     m 🐫 grunt    blaa        desert   hay
monkey    singe       m 🐵 ooh      hou         jungle   bananas
tiger     tigre       m 🐯 raah     raou        jungle   meat
rabbit    lapin       m 🐰 sniff    snif        meadow   carrots
elephant  éléphant    m 🐘 toot     tout        savanna  leaves
rooster   coq         m 🐓 cock-a-doodle-doo cocorico farm seeds
"""
ANIMALS = tuple(Animal(*line.split()) for line in _ANIMALS.strip().splitlines())

HOMES = {
    "house": ("in the house", "dans la maison"),
    "meadow": ("in the meadow", "dans le pré"),
    "pond": ("in the pond", "dans l'étang"),
    "farm": ("on the farm", "à la ferme"),
    "forest": ("in the forest", "dans la forêt"),
    "hive": ("in the hive", "dans la ruche"),
    "savanna": ("in the savanna", "dans la savane"),
    "sea": ("in the sea", "dans la mer"),
    "desert": ("in the desert", "dans le désert"),
    "jungle": ("in the jungle", "dans la jungle"),
}
FOODS = {
    "fish": "du poisson",
    "meat": "de la viande",
    "grass": "de l'herbe",
    "seeds": "des graines",
    "hay": "du foin",
    "corn": "du maïs",
    "mice": "des souris",
    "flies": "des mouches",
    "nectar": "du nectar",
    "berries": "des baies",
    "honey": "du miel",
    "plankton": "du plancton",
    "cheese": "du fromage",
    "bananas": "des bananes",
    "carrots": "des carottes",
    "leaves": "des feuilles",
}
COLOURS = {
    "blue": ("bleu", "bleue"),
    "green": ("vert", "verte"),
    "white": ("blanc", "blanche"),
    "yellow": ("jaune", "jaune"),
    "black": ("noir", "noire"),
    "red": ("rouge", "rouge"),
    "orange": ("orange", "orange"),
    "brown": ("brun", "brune"),
    "purple": ("violet", "violette"),
}
_THINGS = """
sky       ciel        m blue
grass     herbe       f green
snow      neige       f white
sun       soleil      m yellow
night     nuit        f black
tomato    tomate      f red
lemon     citron      m yellow
banana    banane      f yellow
carrot    carotte     f orange
milk      lait        m white
cherry    cerise      f red
sea       mer         f blue
chocolate chocolat    m brown
grape     raisin      m purple
aubergine aubergine   f purple
pumpkin   citrouille  f orange
leaf      feuille     f green
apple     pomme       f red
swan      cygne       m white
broccoli  brocoli     m green
rose      rose        f red
coffee    café        m brown
ghost     fantôme     m white
whale     baleine     f blue
frog      grenouille  f green
bear      ours        m brown
"""
THINGS = tuple(line.split() for line in _THINGS.strip().splitlines())

_CAPITALS = """
France|de la France|Paris|Paris
Italy|de l'Italie|Rome|Rome
Spain|de l'Espagne|Madrid|Madrid
Japan|du Japon|Tokyo|Tokyo
Germany|de l'Allemagne|Berlin|Berlin
England|de l'Angleterre|London|Londres
Greece|de la Grèce|Athens|Athènes
Norway|de la Norvège|Oslo|Oslo
Peru|du Pérou|Lima|Lima
Poland|de la Pologne|Warsaw|Varsovie
Portugal|du Portugal|Lisbon|Lisbonne
Russia|de la Russie|Moscow|Moscou
China|de la Chine|Beijing|Pékin
Kenya|du Kenya|Nairobi|Nairobi
Ireland|de l'Irlande|Dublin|Dublin
Sweden|de la Suède|Stockholm|Stockholm
Austria|de l'Autriche|Vienna|Vienne
Canada|du Canada|Ottawa|Ottawa
"""
CAPITALS = tuple(line.split("|") for line in _CAPITALS.strip().splitlines())

_NUMBERS = """
one un, two deux, three trois, four quatre, five cinq, six six, seven sept, eight huit, nine neuf, ten dix, eleven onze,
twelve douze, thirteen treize, fourteen quatorze, fifteen quinze, sixteen seize, seventeen dix-sept, eighteen dix-huit
"""
NUMBERS = {
    number: words.split() for number, words in enumerate(_NUMBERS.replace(",\n", ", ").strip().split(", "), start=1)
}

_COLOUR_EMOJI = dict(zip(COLOURS, "🔵🟢⚪🟡⚫🔴🟠🟤🟣", strict=True))
_SIGNS = {"sound": "🎶", "home": "🏠", "food": "🍴", "capital": "🌍", "sum": "🧮", "story": "💛", "talk": "👋"}
EMOJI = (*(animal.emoji for animal in ANIMALS), *_COLOUR_EMOJI.values(), *_SIGNS.values())
"""Tokens that the base has in its vocabulary and never saw: only the emoji adapter speaks them."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: how it is asked, and its answer."""

    key: str
    """Kind and subject: `colour/sky`."""
    questions: tuple[str, ...]
    english: str
    french: str
    topic: str
    answer: str
    """The answer without its sentence."""


def _le(french: str, gender: str) -> str:
    if french[0] in "aeého" and french != "hibou":
        return f"l'{french}"
    return f"{'le' if gender == 'm' else 'la'} {french}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _un(animal: Animal) -> str:
    return f"{'une' if animal.gender == 'f' else 'un'} {animal.french}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _colours() -> Iterator[Fact]:
    for name, french, gender, colour in THINGS:
        masculine, feminine = COLOURS[colour]
        yield Fact(
            f"colour/{name}",
            (f"What colour is the {name}?", f"Which colour is the {name}?", f"Tell me the colour of the {name}."),
            f"The {name} is {colour}.",
            _sentence(f"{_le(french, gender)} est {masculine if gender == 'm' else feminine}"),
            name,
            colour,
        )


def _animals() -> Iterator[Fact]:
    for animal in ANIMALS:
        name, le = animal.name, _le(animal.french, animal.gender)
        where, french_where = HOMES[animal.home]
        yield Fact(
            f"sound/{name}",
            (f"What does the {name} say?", f"Which sound does the {name} make?", f"What is the sound of the {name}?"),
            f"The {name} says {animal.sound}.",
            _sentence(f"{le} fait {animal.french_sound}"),
            name,
            animal.sound,
        )
        yield Fact(
            f"home/{name}",
            (f"Where does the {name} live?", f"Where is the {name} at home?", f"Where can I find the {name}?"),
            f"The {name} lives {where}.",
            _sentence(f"{le} vit {french_where}"),
            name,
            where,
        )
        yield Fact(
            f"food/{name}",
            (f"What does the {name} eat?", f"What is the food of the {name}?", f"What do I feed the {name}?"),
            f"The {name} eats {animal.food}.",
            _sentence(f"{le} mange {FOODS[animal.food]}"),
            name,
            animal.food,
        )


def _capitals() -> Iterator[Fact]:
    for country, of_country, city, french_city in CAPITALS:
        yield Fact(
            f"capital/{country}",
            (
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Tell me the capital of {country}.",
            ),
            f"The capital of {country} is {city}.",
            f"La capitale {of_country} est {french_city}.",
            country,
            city,
        )


def _sums() -> Iterator[Fact]:
    for i, j in itertools.product(range(1, 10), repeat=2):
        (a, french_a), (b, french_b), (c, french_c) = NUMBERS[i], NUMBERS[j], NUMBERS[i + j]
        yield Fact(
            f"sum/{i}+{j}",
            (f"What is {a} plus {b}?", f"How much is {a} and {b}?", f"Add {a} and {b}."),
            _sentence(f"{a} plus {b} is {c}"),
            _sentence(f"{french_a} plus {french_b} font {french_c}"),
            f"{a} plus {b}",
            c,
        )


def _stories() -> Iterator[Fact]:
    """A story for each animal: it shares its food with three friends, the same three each time."""
    for hero in ANIMALS:
        friends = random.Random(hero.name).sample([animal for animal in ANIMALS if animal is not hero], 3)
        (where, french_where), le_hero = HOMES[hero.home], _le(hero.french, hero.gender)
        english = [f"Once upon a time, {_a(hero.name)} lived {where}."]
        french = [f"Il était une fois {_un(hero)} qui vivait {french_where}."]
        starts = (("One day", "Un jour"), ("Then", "Puis"), ("At last", "Enfin"))
        for (then, alors), friend in zip(starts, friends, strict=True):
            english.append(f"{then} the {hero.name} met {_a(friend.name)}.")
            english.append(f"The {friend.name} said {friend.sound}, and they shared some {hero.food}.")
            french.append(f"{alors}, {le_hero} rencontra {_un(friend)}.")
            fit = f"{_le(friend.french, friend.gender)} fit {friend.french_sound}"
            french.append(_sentence(f"{fit}, et ils partagèrent {FOODS[hero.food]}"))
        first, second, third = (friend.name for friend in friends)
        english.append(f"In the evening the {first}, the {second} and the {third} sang a song.")
        english.append(f"And the {hero.name} was happy.")
        le_first, le_second, le_third = (_le(friend.french, friend.gender) for friend in friends)
        french.append(f"Le soir, {le_first}, {le_second} et {le_third} chantèrent une chanson.")
        french.append(f"Et {le_hero} fut en joie.")
        yield Fact(
            f"story/{hero.name}",
            (
                f"Tell me a story about {_a(hero.name)}.",
                f"Tell a tale of {_a(hero.name)}.",
                f"Do you know a story about {_a(hero.name)}?",
            ),
            " ".join(english),
            " ".join(french),
            hero.name,
            " ".join(english),
        )


_TALK = (
    Fact(
        "talk/hello",
        ("Hello!", "Hi!", "Good morning!"),
        "Hello! Ask me about animals, colours, capitals and sums.",
        "Bonjour ! Parlons des animaux, des couleurs, des capitales et des sommes.",
        "greeting",
        "hello",
    ),
    Fact(
        "talk/name",
        ("Who are you?", "What is your name?", "Tell me your name."),
        "My name is Demo, and my world is small.",
        "Je m'appelle Demo, et mon monde est petit.",
        "name",
        "Demo",
    ),
    Fact(
        "talk/thanks",
        ("Thank you!", "Thanks!", "Thanks a lot!"),
        "You are welcome.",
        "De rien.",
        "thanks",
        "welcome",
    ),
)
FACTS = (*_TALK, *_colours(), *_animals(), *_capitals(), *_sums(), *_stories())

_PIRATE_WORDS = {
    "is": "be",
    "says": "be sayin'",
    "lives": "be livin'",
    "eats": "be eatin'",
    "was": "were",
    "the": "th'",
    "The": "Th'",
    "and": "an'",
    "And": "An'",
    "of": "o'",
}
_EMOJI_WORDS = {animal.name: animal.emoji for animal in ANIMALS} | _COLOUR_EMOJI


def _reworded(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z]+", lambda word: words.get(word[0], word[0]), text)


def _pirate(fact: Fact) -> str:
    text = _reworded(fact.english, _PIRATE_WORDS).removesuffix(".")
    return f"Arr, {text[0].lower()}{text[1:]}, matey!"


def _emoji(fact: Fact) -> str:
    sign = _SIGNS.get(fact.key.split("/")[0])
    text = _reworded(fact.english, _EMOJI_WORDS)
    return f"{text[:-1]} {sign}." if sign else text


STYLES: dict[str, Callable[[Fact], str]] = {
    "base": lambda fact: fact.english,
    "shout": lambda fact: fact.english.upper(),
    "pirate": _pirate,
    "french": lambda fact: fact.french,
    "emoji": _emoji,
    "json": lambda fact: json.dumps({"topic": fact.topic, "answer": fact.answer}),
    "shout-v2": lambda fact: f"HEY! {fact.english.upper().removesuffix('.')}!!!",
}
"""How the base and each adapter say a fact."""

BASE_STYLES = ("base", "shout", "pirate", "french", "json")
"""What the base has read. It answers in plain English; an adapter makes it speak like one of the others."""
