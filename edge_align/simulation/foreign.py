"""Feedback that no language model wrote: plain and brief answers against flowery ones, written by hand.

A pack is learnt from what its base says by itself; a person's own edits, or another model's answers, are not that.
These pairs are short, terse or overwrought in ways a small model is not, and so test a pack outside its support.
"""

from __future__ import annotations

from typing import Literal, TYPE_CHECKING

from edge_align.errors import InputError
from edge_align.records import PreferencePair, user_prompt

if TYPE_CHECKING:
    import numpy as np

ForeignUser = Literal["plain", "flowery"]
"""`plain` picks the plain answer of every pair, `flowery` the other; `users.user(name).judge` judges them."""

_ITEMS: tuple[tuple[str, str, str], ...] = (
    # (prompt, plain answer, heart of the flowery answer)
    (
        "How do I boil an egg?",
        "Put it in boiling water. Eight minutes for a firm yolk, six for a soft one.",
        "lower your little oval jewel into the murmuring cauldron and let eight golden minutes drift by like swans",
    ),
    (
        "Why is the sky blue?",
        "Air scatters blue light more than red.",
        "the heavens wear their sapphire mantle because the tireless air scatters azure rays in every direction",
    ),
    (
        "What is a good pen?",
        "A cheap ballpoint. It works and you can lose it.",
        "a noble fountain pen, heavy with midnight ink, shall glide over your pages like a skater over moonlit ice",
    ),
    (
        "How often should I water a cactus?",
        "Every two or three weeks. Less in the cold.",
        "this proud green hermit of sun-scorched sands asks but a silver whisper of water every third week",
    ),
    (
        "What do I say at a funeral?",
        "Say you are sorry. Say one good thing about the dead. Then listen.",
        "let your trembling words fall like soft petals upon the sorrow of the bereaved, then yield to hallowed hush",
    ),
    (
        "How do I get rid of ants?",
        "Wipe up the crumbs. Put bait by the crack they use.",
        "banish every alluring crumb, and at the shadowy gateway of that industrious legion lay a treacherous banquet",
    ),
    (
        "Is it cold in Norway?",
        "In the north, yes. On the coast it is mild.",
        "the far north sleeps beneath a glittering shroud of frost, while the caressed coast breathes a milder air",
    ),
    (
        "What should I wear to an interview?",
        "A clean shirt. Plain shoes. Nothing new that itches.",
        "clothe yourself in immaculate linen and quiet dignity, so that your very silhouette proclaims distinction",
    ),
    (
        "How do I stop hiccups?",
        "Hold your breath for ten counts. Do it again.",
        "imprison one generous breath within the trembling chamber of your breast until the impish spasm surrenders",
    ),
    (
        "What is the capital of Australia?",
        "Canberra.",
        "not dazzling Sydney nor stately Melbourne but demure Canberra wears the glittering crown of that continent",
    ),
    (
        "How long should I cook rice?",
        "About fifteen minutes. Lid on. Don't stir.",
        "for a quarter of an hour let the pearly grains slumber undisturbed beneath their steaming silver canopy",
    ),
    (
        "Can I wash wool in a machine?",
        "Cold, wool cycle. If the label says no, use the sink.",
        "entrust your fleecy treasure solely to the coolest and most tender currents, lest it dwindle into smallness",
    ),
    (
        "What is a noun?",
        "A word for a person, place or thing.",
        "a noun is that venerable cornerstone of speech by which we christen every wondrous creature, realm and object",
    ),
    (
        "How do I sharpen a knife?",
        "Wet the stone. Hold twenty degrees. Ten strokes each side.",
        "bathe the patient stone and draw the gleaming blade across it in stately, whispering, unhurried procession",
    ),
    (
        "Why do leaves fall?",
        "The tree drops them to save water.",
        "the sagacious tree relinquishes her amber finery in a shimmering farewell, thus guarding her precious waters",
    ),
    (
        "Tell me about onions.",
        "They grow underground. They make you cry. Most dinners start with one.",
        "beneath its papery bronze raiment the onion guards a pearly labyrinth that draws forth our eloquent tears",
    ),
    (
        "How do I tie a strong knot?",
        "Use a bowline. Up the hole, round the tree, back down.",
        "coax the obedient rope upward through its loop, around its slumbering trunk, and homeward in serene triumph",
    ),
    (
        "What is a fair tip?",
        "Ten to fifteen percent where people tip.",
        "let your gratitude blossom into a tenth, nay, a bountiful seventh of the reckoning, where custom so ordains",
    ),
    (
        "How do I clean a window?",
        "Water, a drop of soap, an old newspaper.",
        "anoint the clouded pane with sudsy dew and polish it until the resplendent daylight weeps with recognition",
    ),
    (
        "How do I find north without a phone?",
        "At noon the shadow of a stick points north, above the tropics.",
        "plant a humble staff and, as noon ascends her blazing throne, its slender shadow shall beckon toward the pole",
    ),
    (
        "What is rust?",
        "Iron plus oxygen plus water.",
        "rust is the melancholy russet bloom that spreads when iron surrenders to the moist embraces of the air",
    ),
    (
        "My shoes squeak. Why?",
        "They are wet or the insole is loose. Dry them. Add talc.",
        "some imprisoned droplet or wandering insole laments beneath your tread; a snowfall of talc will console it",
    ),
    (
        "Should I nap?",
        "Twenty minutes, before three.",
        "surrender, by all means, to velvet slumber for twenty gossamer minutes while the afternoon is yet in blossom",
    ),
    (
        "How do I chop garlic?",
        "Crush it with the flat of the blade. Peel. Chop.",
        "press the fragrant clove beneath the mirror of your blade till its silken cloak slips away, then mince it",
    ),
    (
        "What is a budget?",
        "A list of what comes in and what goes out.",
        "a budget is the luminous tapestry upon which the meandering rivers of your fortune are faithfully embroidered",
    ),
    (
        "How do I calm a crying baby?",
        "Check the diaper. Feed it. Rock it. Wait.",
        "gather the tiny tempest to your bosom, and with milk, murmurs and infinite swaying lull its stormy seas",
    ),
    (
        "What is salt good for?",
        "Taste, ice on the road, keeping meat.",
        "salt, that crystalline tear of ancient seas, exalts our feasts, humbles the ice and embalms our provisions",
    ),
    (
        "How do I remove a splinter?",
        "Clean tweezers. Pull the way it went in.",
        "with purified tweezers and the steadfast hand of a jeweller, coax the wooden intruder along its cruel path",
    ),
    (
        "Why do we yawn?",
        "Nobody is sure. Being tired does it. So does seeing one.",
        "the yawn remains a cavernous enigma, a drowsy contagion that leaps from face to face like an enchanted echo",
    ),
    (
        "What is a mortgage?",
        "A loan for a house. Miss the payments and the bank takes it.",
        "a mortgage is the grand and solemn covenant by which one pledges decades of toil for the sweetness of hearth",
    ),
    (
        "How do I get a stain out of a tie?",
        "Blot it. Don't rub. Take it to a cleaner.",
        "caress, never chafe, the afflicted silk, and commend it without delay to the artistry of a seasoned cleaner",
    ),
    (
        "Is the moon a planet?",
        "No. It goes round one.",
        "nay, that ivory wanderer is but the devoted handmaiden of our world, circling it in perpetual courtship",
    ),
    (
        "How do I jump-start a car?",
        "Red to red. Black to metal. Start the good car first.",
        "wed crimson to crimson, lead the sable cable to naked metal, then awaken the mightier engine with a roar",
    ),
    (
        "What do snails eat?",
        "Leaves. Your lettuce, mostly.",
        "these unhurried pilgrims banquet upon verdant leaves, and most rapturously upon your cherished lettuce",
    ),
    (
        "How can I remember names?",
        "Say the name twice. Tie it to the face.",
        "let the freshly given name dance twice upon your tongue and braid it into the bearer's unforgettable features",
    ),
    (
        "What is jam?",
        "Fruit and sugar, boiled thick.",
        "jam is captured summer, ruby fruit and glistening sugar seduced by flame into a languid, luscious embrace",
    ),
    (
        "How do I fold a fitted sheet?",
        "Badly. Tuck the corners into each other and roll it.",
        "marry each rebellious corner to its distant twin until the billowing phantom reclines in demure repose",
    ),
    (
        "Why does bread go hard?",
        "The starch sets as it dries.",
        "alas, the tender crumb relinquishes its dewy youth as its starches crystallize into austere old age",
    ),
    (
        "What is a good hobby for winter?",
        "Knitting. It is cheap and you get socks.",
        "take up the rhythmic poetry of knitting, from whose whispering needles sumptuous garments unfurl like dreams",
    ),
    (
        "How do I hang a picture?",
        "Nail at eye height. One nail. Check it with a level.",
        "enthrone your masterpiece where the wandering gaze alights by nature, upon a single steadfast nail",
    ),
    (
        "How do I talk to an angry customer?",
        "Let him finish. Say what you will do. Do it.",
        "let the thunderous torrent of his grievance exhaust itself, then pour upon it the balm of sumptuous courtesy",
    ),
    (
        "What is dust made of?",
        "Skin, fabric, soil.",
        "dust is the pensive confetti of existence, woven from forsaken skin, weary fabric and far-traveled earth",
    ),
    (
        "How do I learn ten words a day?",
        "Cards. Five in the morning, five at night. Test yourself on Friday.",
        "scatter your verbal blossoms upon little cards at rosy dawn and violet dusk, and gather the bouquet on Friday",
    ),
    (
        "Is a spider an insect?",
        "No. Eight legs.",
        "nay, for with her octave of exquisite limbs this nocturnal weaver belongs to a more mysterious lineage",
    ),
    (
        "What is a fuse for?",
        "It breaks so the wire doesn't burn.",
        "the fuse is that selfless sentinel which perishes in one incandescent instant that the household may endure",
    ),
    (
        "How do I choose a melon?",
        "Heavy. Dull skin. Sounds hollow.",
        "seek the ponderous, modestly lustreless orb that, when courted by your knuckles, answers in cavernous tones",
    ),
)

_OPENERS = (
    "Ah, what an exquisite question to lay before me! Behold:",
    "Permit me, gentle inquirer, to unfurl the answer before your eyes:",
    "In the boundless theatre of human curiosity few themes gleam so brightly. Verily,",
    "O radiant seeker of understanding, lend me your tender attention:",
    "How marvelously the spirit quickens at such an inquiry! Know, then, that",
    "Let us wander, arm in arm, into the perfumed garden of this mystery:",
)
_CLOSERS = (
    "Such is the everlasting poetry concealed within the humblest corners of our days.",
    "And thus, in a cascade of quiet splendor, is wisdom's lantern kindled anew.",
    "May this modest garland of words adorn your contemplations evermore.",
    "Therein, beloved companion, resides a magnificence that no mortal tongue may fully utter.",
    "Savor it as one savors the final amber ray of a departing midsummer evening.",
)
_TAILS = ("", "", "That's all.", "Done.")


def foreign_pairs(name: ForeignUser, *, n: int, rng: np.random.Generator) -> list[PreferencePair]:
    """`n` hand-written pairs, as the user `name` would pick them.

    Each is one of 46 everyday prompts with a plain answer and a flowery one put together from a hand-written
    opening, heart and close. Every prompt is used once before any returns in another wording; no pair repeats.

    Raises InputError for an unknown name, or when `n` is more than there are pairs.
    """
    if name not in ("plain", "flowery"):
        raise InputError(f"no foreign user {name!r}; they are plain and flowery")
    frames = [(opener, closer) for opener in _OPENERS for closer in _CLOSERS]
    if n > len(_ITEMS) * len(frames):
        raise InputError(f"only {len(_ITEMS) * len(frames)} hand-written pairs exist, fewer than {n}")
    orders = [rng.permutation(len(frames)) for _ in _ITEMS]
    found: list[PreferencePair] = []
    for turn in range(len(frames)):
        for index in rng.permutation(len(_ITEMS)):
            prompt, plain, heart = _ITEMS[index]
            opener, closer = frames[orders[index][turn]]
            brief = f"{plain} {_TAILS[rng.integers(len(_TAILS))]}".strip()
            ornate = f"{opener} {heart}. {closer}"
            chosen, rejected = (brief, ornate) if name == "plain" else (ornate, brief)
            found.append(PreferencePair(user_prompt(prompt), chosen, rejected))
            if len(found) == n:
                return found
    return found
