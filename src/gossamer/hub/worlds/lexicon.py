"""The words of the still world: what a child of four says. Templates are both written from and read back by regexes.

Slots of a template: {a} an indefinite noun phrase, {the} and {other} definite ones, {list} several, {place}, {bg} and
{at} the background as a thing and as a place, {colour}, {size}, {n} with {nouns}, {rel}, {glyph}, {doing}, {kind},
{kinds}.
"""

from __future__ import annotations

from gossamer.hub.worlds.scene import KINDS

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
)  # fmt: skip
PLURALS = {kind: kind + "s" for kind in KINDS} | {"box": "boxes", "butterfly": "butterflies", "fish": "fish"}
SIZE_WORDS = {"big": ("big", "large"), "small": ("small", "little")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACE_WORDS = {
    "top left": ("in the top left", "at the top left", "in the top left corner"),
    "top": ("at the top",),
    "top right": ("in the top right", "at the top right", "in the top right corner"),
    "left": ("on the left",),
    "middle": ("in the middle",),
    "right": ("on the right",),
    "bottom left": ("in the bottom left", "at the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom",),
    "bottom right": ("in the bottom right", "at the bottom right", "in the bottom right corner"),
}
SCENERY = {
    "beach": ("a beach", "the beach"),
    "garden": ("a garden", "the garden"),
    "meadow": ("a meadow", "the grass"),
    "night": ("a dark night", "the night"),
    "room": ("a room", "the room"),
    "sea": ("the sea", "the water"),
    "snow": ("the snow", "the white snow"),
    "street": ("a street", "the road"),
}
WHEREABOUTS = {
    "beach": ("at the beach", "on the sand"),
    "garden": ("in the garden", "by the fence"),
    "meadow": ("in the meadow", "on the grass"),
    "night": ("at night", "in the dark"),
    "room": ("in the room", "by the wall"),
    "sea": ("at sea", "on the water"),
    "snow": ("in the snow", "on the snow"),
    "street": ("on the street", "on the road"),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "background": (
        "this is a picture of {bg}", "the picture shows {bg}", "here we see {bg}", "come and look at {bg}",
        "we are {at}",
        "this picture is {at}", "mom and I are {at}", "today we play {at}",
    ),
    "list": (
        "I see {list}", "I can see {list}", "look at {list}", "we see {list}", "you can see {list}",
        "this picture has {list}",
        "I see {list} {at}", "we found {list} {at}", "you can see {list} {at}", "here we have {list} {at}",
    ),
    "thing": (
        "there is {a} {place}", "I see {a} {place}", "{place} there is {a}", "{place} you can see {a}",
        "look at {a} {place}",
        "we can find {a} {place}", "{place} is {a}", "somebody put {a} {place}",
    ),
    "found": ("there is {a}", "I see {a}", "here is {a}", "look, {a}", "I found {a}", "and here comes {a}"),
    "place": ("{the} is {place}", "you can find {the} {place}", "see {the} {place}"),
    "its_place": ("it is {place}", "you can find it {place}", "look for it {place}"),
    "colour": ("{the} is {colour}", "{the} is all {colour}", "somebody made {the} {colour}"),
    "its_colour": ("it is {colour}", "it is all {colour}", "its colour is {colour}", "somebody made it {colour}"),
    "size": ("{the} is {size}", "{the} is very {size}", "{the} looks {size}"),
    "its_size": ("it is {size}", "it is very {size}", "it looks {size}"),
    "both": ("{the} is {size} and {colour}",),
    "its_both": ("it is {size} and {colour}",),
    "count": ("there are {n} {nouns}", "I count {n} {nouns}", "I can count {n} {nouns}", "we see {n} {nouns} here"),
    "total": ("there are {n} things in the picture", "I count {n} things", "in all there are {n} things"),
    "relation": ("{the} is {rel} {other}", "you can see {the} {rel} {other}"),
    "glyph": ("{the} has {glyph} on it", "I can read {glyph} on {the}", "{glyph} is on {the}"),
    "its_glyph": ("it has {glyph} on it", "I can read {glyph} on it"),
    "doing": ("{the} is {doing}", "{the} is {doing} now"),
    "its_doing": ("it is {doing}", "it is {doing} now", "I think it is {doing}"),
    "absent": ("there is no {kind} here", "I see no {kind}", "I do not see any {kinds}", "there are no {kinds} to see"),
    "caption": ("{list}", "{list} {at}", "a picture of {list}", "a picture of {list} {at}", "a drawing of {list} {at}"),
}  # fmt: skip

FILLERS = (
    "how nice", "I like it", "what a nice picture", "it is fun to look at", "we like this picture very much",
    "I want to go there too", "that makes me happy", "do you like it?", "let us play", "mom likes it too",
    "what a lot to see",
    "this is a good place to play", "I will show it to my dad", "can you tell a story about it?",
    "now you know all about it",
    "it makes me smile", "let us look again", "my friend will like this", "how pretty it is", "this is so much fun",
)  # fmt: skip
LORE: dict[str, tuple[str, ...]] = {
    "apple": ("an apple is good to eat", "an apple is sweet", "apples grow high up", "I want to bite into an apple"),
    "ball": ("a ball can roll", "you can kick a ball", "throw a ball and catch it", "a ball is round"),
    "bell": ("a bell can ring", "a bell goes ding dong", "when a bell rings, school is over", "bells are loud"),
    "bird": ("a bird can fly", "birds sing in the morning", "a bird has two wings", "a bird lays eggs in a nest"),
    "boat": ("a boat can float", "the wind pushes a boat along", "a boat goes far away", "you can sail in a boat"),
    "box": ("a box can hold a gift", "what may be in a box?", "open a box and look inside", "you can hide in a box"),
    "butterfly": (
        "a butterfly has soft wings", "a butterfly was a worm once", "butterflies do not bite",
        "a butterfly drinks from plants",
    ),
    "car": ("a car goes fast", "a car has four wheels", "dad drives a car to work", "beep beep says a car"),
    "cat": ("a cat says meow", "a cat likes milk", "cats run after mice", "a cat has soft fur"),
    "cup": ("a cup can hold milk", "you drink tea from a cup", "do not drop a cup", "a hot cup can hurt you"),
    "fish": ("a fish can swim", "fish live in water", "a fish has no legs", "a fish eats little bugs"),
    "flower": ("a flower smells good", "bees like a flower", "give a flower to mom", "a flower needs rain"),
    "hat": ("a hat keeps you warm", "you wear a hat on your head", "grandpa has a hat", "the wind can take a hat"),
    "heart": ("a heart means love", "a heart says I love you", "draw a heart for mom", "my heart goes boom boom"),
    "house": ("people live in a house", "a house keeps us dry", "knock on the door of a house", "a house has a roof"),
    "key": ("a key opens a door", "do not lose a key", "a key is made of metal", "turn a key to lock up"),
    "kite": ("a kite flies on a string", "a kite needs wind", "run fast with a kite", "a kite goes up and down"),
    "moon": (
        "a moon shines when we sleep", "good night says the moon", "you cannot reach a moon", "wolves sing to the moon",
    ),
    "mushroom": (
        "a mushroom grows in the woods", "do not eat a mushroom you find", "a mushroom is like a tiny roof",
        "rain makes a mushroom grow",
    ),
    "rocket": (
        "a rocket flies into space", "three two one and a rocket goes up", "a rocket is very loud",
        "I want to ride in a rocket",
    ),
    "star": ("a star can twinkle", "make a wish on a star", "a star is far away", "a star has five points"),
    "sun": ("a sun gives us light", "a sun is warm", "good morning says the sun", "do not look into the sun"),
    "tree": ("a tree is tall", "you can climb a tree", "a tree drinks rain", "squirrels live in a tree"),
    "umbrella": (
        "an umbrella keeps you dry", "open an umbrella when it rains", "grandma has an umbrella",
        "shut an umbrella when rain stops",
    ),
}  # fmt: skip
