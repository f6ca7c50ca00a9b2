"""The demo's small world: facts about animals, things, places and numbers, told in six styles.

All the text that the demo's base and adapters learn comes from here. `train.py` samples it; nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
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
BY_NAME = {animal.name: animal for animal in ANIMALS}

HOMES = {
    "house": ("in the house", "dans la maison", "🏠"),
    "meadow": ("in the meadow", "dans le pré", "🌼"),
    "pond": ("in the pond", "dans l'étang", "💧"),
    "farm": ("on the farm", "à la ferme", "🚜"),
    "forest": ("in the forest", "dans la forêt", "🌲"),
    "hive": ("in the hive", "dans la ruche", "🏡"),
    "savanna": ("in the savanna", "dans la savane", "🌾"),
    "sea": ("in the sea", "dans la mer", "🌊"),
    "desert": ("in the desert", "dans le désert", "🌵"),
    "jungle": ("in the jungle", "dans la jungle", "🌴"),
}
FOODS = {
    "fish": ("du poisson", "🐟"),
    "meat": ("de la viande", "🍖"),
    "grass": ("de l'herbe", "🌱"),
    "seeds": ("des graines", "🌰"),
    "hay": ("du foin", "🌾"),
    "corn": ("du maïs", "🌽"),
    "mice": ("des souris", "🐭"),
    "flies": ("des mouches", "🪰"),
    "nectar": ("du nectar", "🌸"),
    "berries": ("des baies", "🫐"),
    "honey": ("du miel", "🍯"),
    "plankton": ("du plancton", "🦐"),
    "cheese": ("du fromage", "🧀"),
    "bananas": ("des bananes", "🍌"),
    "carrots": ("des carottes", "🥕"),
    "leaves": ("des feuilles", "🍃"),
}
COLOURS = {
    "blue": ("bleu", "bleue", "🔵"),
    "green": ("vert", "verte", "🟢"),
    "white": ("blanc", "blanche", "⚪"),
    "yellow": ("jaune", "jaune", "🟡"),
    "black": ("noir", "noire", "⚫"),
    "red": ("rouge", "rouge", "🔴"),
    "orange": ("orange", "orange", "🟠"),
    "brown": ("brun", "brune", "🟤"),
    "purple": ("violet", "violette", "🟣"),
}
_THINGS = """
sky       ciel        m ⛅ blue
grass     herbe       f 🌱 green
snow      neige       f ⛄ white
sun       soleil      m 🌞 yellow
night     nuit        f 🌃 black
tomato    tomate      f 🍅 red
lemon     citron      m 🍋 yellow
banana    banane      f 🍌 yellow
carrot    carotte     f 🥕 orange
milk      lait        m 🥛 white
cherry    cerise      f 🍒 red
sea       mer         f 🌊 blue
chocolate chocolat    m 🍫 brown
grape     raisin      m 🍇 purple
aubergine aubergine   f 🍆 purple
pumpkin   citrouille  f 🎃 orange
leaf      feuille     f 🍃 green
apple     pomme       f 🍎 red
swan      cygne       m 🦢 white
broccoli  brocoli     m 🥦 green
rose      rose        f 🌹 red
coffee    café        m ☕ brown
ghost     fantôme     m 👻 white
whale     baleine     f 🐳 blue
frog      grenouille  f 🐸 green
bear      ours        m 🐻 brown
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

EMOJI = tuple(
    dict.fromkeys(
        [animal.emoji for animal in ANIMALS]
        + [emoji for *_, emoji in (*HOMES.values(), *FOODS.values(), *COLOURS.values())]
        + [thing[3] for thing in THINGS]
        + ["🌍", "🧮", "🎶", "💛"]
    )
)
"""Tokens that the base has in its vocabulary and never saw: only the emoji adapter speaks them."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: how it is asked, and its answer in English, in French, and with emoji for nouns."""

    key: str
    questions: tuple[str, ...]
    english: str
    french: str
    emoji: str
    topic: str
    answer: str


def _the(french: str, gender: str) -> str:
    if french[0] in "aeého" and french not in ("hibou",):
        return f"l'{french}"
    return f"{'le' if gender == 'm' else 'la'} {french}"


def _capital_first(text: str) -> str:
    return text[0].upper() + text[1:]


def _colours() -> list[Fact]:
    facts = []
    for name, french, gender, emoji, colour in THINGS:
        masculine, feminine, dot = COLOURS[colour]
        adjective = masculine if gender == "m" else feminine
        facts.append(
            Fact(
                f"colour/{name}",
                (f"What colour is the {name}?", f"Which colour is the {name}?", f"Tell me the colour of the {name}."),
                f"The {name} is {colour}.",
                f"{_capital_first(_the(french, gender))} est {adjective}.",
                f"The {emoji} is {dot}.",
                name,
                colour,
            )
        )
    return facts


def _animals() -> list[Fact]:
    facts = []
    for a in ANIMALS:
        the, (where, french_where, home_emoji) = _capital_first(_the(a.french, a.gender)), HOMES[a.home]
        french_food, food_emoji = FOODS[a.food]
        facts += [
            Fact(
                f"sound/{a.name}",
                (
                    f"What does the {a.name} say?",
                    f"Which sound does the {a.name} make?",
                    f"What is the sound of the {a.name}?",
                ),
                f"The {a.name} says {a.sound}.",
                f"{the} fait {a.french_sound}.",
                f"The {a.emoji} says {a.sound} 🎶.",
                a.name,
                a.sound,
            ),
            Fact(
                f"home/{a.name}",
                (
                    f"Where does the {a.name} live?",
                    f"Where is the {a.name} at home?",
                    f"Where can I find the {a.name}?",
                ),
                f"The {a.name} lives {where}.",
                f"{the} vit {french_where}.",
                f"The {a.emoji} lives {where.rsplit(' ', 1)[0]} {home_emoji}.",
                a.name,
                where,
            ),
            Fact(
                f"food/{a.name}",
                (f"What does the {a.name} eat?", f"What is the food of the {a.name}?", f"What do I feed the {a.name}?"),
                f"The {a.name} eats {a.food}.",
                f"{the} mange {french_food}.",
                f"The {a.emoji} eats {food_emoji}.",
                a.name,
                a.food,
            ),
        ]
    return facts


def _capitals() -> list[Fact]:
    return [
        Fact(
            f"capital/{country}",
            (
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Tell me the capital of {country}.",
            ),
            f"The capital of {country} is {city}.",
            f"La capitale {of_country} est {french_city}.",
            f"The capital of {country} is {city} 🌍.",
            country,
            city,
        )
        for country, of_country, city, french_city in CAPITALS
    ]


def _sums() -> list[Fact]:
    facts = []
    for i, j in itertools.product(range(1, 10), repeat=2):
        (a, french_a), (b, french_b), (c, french_c) = NUMBERS[i], NUMBERS[j], NUMBERS[i + j]
        facts.append(
            Fact(
                f"sum/{i}+{j}",
                (f"What is {a} plus {b}?", f"How much is {a} and {b}?", f"Add {a} and {b}."),
                f"{_capital_first(a)} plus {b} is {c}.",
                f"{_capital_first(french_a)} plus {french_b} font {french_c}.",
                f"{_capital_first(a)} plus {b} is {c} 🧮.",
                f"{a} plus {b}",
                c,
            )
        )
    return facts


def _stories() -> list[Fact]:
    """A story for each animal: it shares its food with three friends, the same three each time."""
    facts = []
    for hero in ANIMALS:
        friends = random.Random(hero.name).sample([animal for animal in ANIMALS if animal is not hero], 3)
        where, french_where, home_emoji = HOMES[hero.home]
        french_food, food_emoji = FOODS[hero.food]
        one, french_hero = ("une" if hero.gender == "f" else "un"), _the(hero.french, hero.gender)
        english = [f"Once upon a time, {_a(hero.name)} lived {where}."]
        french = [f"Il était une fois {one} {hero.french} qui vivait {french_where}."]
        emoji = [f"Once upon a time, a {hero.emoji} lived {where.rsplit(' ', 1)[0]} {home_emoji}."]
        for then, alors, friend in zip(
            ("One day", "Then", "At last"), ("Un jour", "Puis", "Enfin"), friends, strict=True
        ):
            un, le = ("une" if friend.gender == "f" else "un"), _the(friend.french, friend.gender)
            english.append(f"{then} the {hero.name} met {_a(friend.name)}.")
            french.append(f"{alors}, {french_hero} rencontra {un} {friend.french}.")
            emoji.append(f"{then} the {hero.emoji} met a {friend.emoji}.")
            english.append(f"The {friend.name} said {friend.sound}, and they shared some {hero.food}.")
            french.append(f"{_capital_first(le)} fit {friend.french_sound}, et ils partagèrent {french_food}.")
            emoji.append(f"The {friend.emoji} said {friend.sound} 🎶, and they shared some {food_emoji}.")
        names = [friend.name for friend in friends]
        english.append(f"In the evening the {names[0]}, the {names[1]} and the {names[2]} sang a song.")
        english.append(f"And the {hero.name} was happy.")
        les = [_the(friend.french, friend.gender) for friend in friends]
        french.append(f"Le soir, {les[0]}, {les[1]} et {les[2]} chantèrent une chanson.")
        french.append(f"Et {french_hero} fut en joie.")
        marks = [friend.emoji for friend in friends]
        emoji.append(f"In the evening the {marks[0]}, the {marks[1]} and the {marks[2]} sang a song 🎶.")
        emoji.append(f"And the {hero.emoji} was happy 💛.")
        facts.append(
            Fact(
                f"story/{hero.name}",
                (
                    f"Tell me a story about {_a(hero.name)}.",
                    f"Tell a tale of {_a(hero.name)}.",
                    f"Do you know a story about {_a(hero.name)}?",
                ),
                " ".join(english),
                " ".join(french),
                " ".join(emoji),
                hero.name,
                " ".join(english),
            )
        )
    return facts


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


FACTS = (*_colours(), *_animals(), *_capitals(), *_sums(), *_stories())


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


def _pirate(fact: Fact) -> str:
    text = re.sub(r"[A-Za-z]+", lambda word: _PIRATE_WORDS.get(word[0], word[0]), fact.english)
    first = text.split(" ", 1)[0]
    # Names keep their capital; the words that begin these sentences are no names.
    return f"Arr, {text.replace(first, first.lower(), 1).removesuffix('.')}, matey!"


STYLES: dict[str, Callable[[Fact], str]] = {
    "base": lambda fact: fact.english,
    "shout": lambda fact: fact.english.upper(),
    "pirate": _pirate,
    "french": lambda fact: fact.french,
    "emoji": lambda fact: fact.emoji,
    "json": lambda fact: json.dumps({"topic": fact.topic, "answer": fact.answer}),
    "shout-v2": lambda fact: f"HEY! {fact.english.upper().removesuffix('.')}!!!",
}
"""How the base and each adapter say a fact."""

BASE_STYLES = ("base", "shout", "pirate", "french", "json")
"""What the base has read. It answers in plain English; an adapter makes it speak like one of the others."""
