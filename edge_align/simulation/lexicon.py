"""A small hand-made sentiment lexicon, and the closed word lists of the other judges.

Words with a second, neutral use that is common in answers (like, kind, well, pretty, fair, right, hard, miss) are
left out. Regular endings are found by rule (`stems`), so each word stands here once.
"""

from __future__ import annotations

from functools import cache

POSITIVE = frozenset(
    """
    good better best great excellent amazing wonderful fantastic awesome marvelous marvellous superb brilliant terrific
    fabulous splendid magnificent glorious outstanding exceptional extraordinary remarkable impressive incredible
    perfect perfection ideal flawless spectacular stunning gorgeous beautiful beauty lovely pleasant pleasure pleasing
    delight delightful charm charming cute adorable sweet elegant graceful grace radiant bright brilliance shine shining
    happy happiness happily happier happiest joy joyful joyous cheerful cheer glad gladly merry jolly bliss blissful
    ecstatic elated thrilled thrill thrilling excited exciting excitement enthusiasm enthusiastic eager delighted
    pleased satisfied satisfying satisfaction content contentment fulfilled fulfilling fulfillment grateful gratitude
    thankful thank thanks appreciate appreciation appreciated blessed blessing bless lucky luck luckily fortunate
    fortunately fortune love beloved adore adoring affection affectionate tender tenderness cherish treasure
    passion passionate romance romantic friend friendly friendship warmth warm welcoming welcome cozy cosy comfort
    comfortable comforting relax relaxed relaxing relaxation calm calming peace peaceful serene serenity tranquil
    tranquility soothe soothing gentle gently kindness kindly kindhearted caring compassion compassionate empathy
    generous generosity helpful supportive support encouraging encourage encouragement inspire inspiring inspiration
    inspirational uplift uplifting motivate motivated motivating motivation hope hopeful optimism optimistic positive
    positivity confident confidence brave bravery courage courageous bold fearless hero heroic proud pride honor honour
    honored admire admirable admiration respect respectful respected trust trusted trustworthy honest honesty sincere
    loyal loyalty faithful reliable dependable wise wisdom clever smart intelligent talented talent gifted genius
    creative creativity imaginative innovative ingenious skilled skillful success successful succeed win winner winning
    won victory triumph triumphant champion achieve achievement accomplish accomplishment accomplished progress improve
    improvement improved thrive thriving flourish flourishing prosper prosperity prosperous rich wealth abundant
    abundance enrich enriching reward rewarding valuable precious priceless worthwhile meaningful beneficial benefit
    advantage useful enjoy enjoyable enjoyment fun funny laugh laughter smile amuse amused amusing humor playful
    entertaining entertainment fascinating fascinated captivating intriguing interesting engaging enchanting enchanted
    magic magical wonder wondrous breathtaking picturesque vibrant lively energetic vitality healthy health fresh
    refreshing refreshed delicious tasty yummy delectable savory mouthwatering flavorful fragrant clean pure safe safety
    secure harmony harmonious balanced freedom free celebrate celebration festive holiday paradise heaven heavenly
    dream sunny sunshine bloom blossom sparkle sparkling glow glowing golden favorite favourite popular praise praised
    recommend congratulations congratulate bravo hooray wow yay cool neat nice nicest fine finest super top-notch
    first-rate easy easier easily effortless smooth convenient effective efficient powerful strong strength resilient
    resilience vivid memorable unforgettable timeless invaluable beautifully wonderfully perfectly miracle gem gift
    adventure adventurous majestic luxurious exquisite heartwarming heartfelt wholesome hug kiss care
    """.split()
)

NEGATIVE = frozenset(
    """
    bad worse worst awful terrible horrible dreadful horrid horrific horrifying ghastly hideous ugly nasty vile
    disgust disgusting disgusted revolting repulsive gross foul filthy dirty dirt stink stinking stinky rotten rot
    poor poorly inferior mediocre lousy crappy crap garbage rubbish trash worthless useless pointless meaningless futile
    failure fail failed failing flop lose loser losing loss lost defeat defeated broken break damage damaged
    destroy destroyed destruction destructive ruin ruined wreck wrecked collapse crash disaster disastrous catastrophe
    catastrophic tragedy tragic crisis emergency danger dangerous hazard hazardous risk risky threat threaten
    threatening unsafe harm harmful hurt hurtful injure injury injured wound wounded pain painful ache suffer suffering
    agony torment torture misery miserable sad sadness sadly sadder unhappy unhappiness sorrow sorrowful grief grieve
    mourn mourning depress depressed depressing depression gloom gloomy bleak dismal dreary melancholy despair desperate
    desperation hopeless hopelessness helpless helplessness lonely loneliness isolated isolation abandoned abandon
    rejected rejection reject neglect neglected unwanted unloved cry crying tears weep weeping sob heartbreak
    heartbroken heartbreaking regret regretful remorse guilt guilty shame ashamed shameful embarrass embarrassed
    embarrassing embarrassment humiliate humiliated humiliating humiliation fear fearful afraid scared scare scary
    frighten frightened frightening terrify terrified terrifying terror horror panic dread anxious anxiety worry worried
    worrying nervous stress stressed stressful tense tension overwhelm overwhelmed overwhelming exhausted exhausting
    exhaustion tired tiring weary fatigue angry anger angrily rage furious fury mad irritate irritated irritating
    irritation annoy annoyed annoying annoyance frustrate frustrated frustrating frustration upset upsetting hate hatred
    hateful despise loathe detest resent resentment bitter bitterness jealous jealousy envy envious hostile hostility
    aggressive aggression violent violence cruel cruelty brutal vicious evil wicked sinister malicious mean-spirited
    rude rudeness insult insulting offensive offend offended disrespect disrespectful mock ridicule ridiculous stupid
    stupidity idiot idiotic dumb fool foolish silly absurd nonsense ignorant ignorance lazy laziness selfish greedy
    greed arrogant arrogance stubborn dishonest lie liar lying deceive deceitful deception cheat cheated cheating fraud
    scam steal stolen theft crime criminal corrupt corruption betray betrayal betrayed unfair unjust injustice wrong
    mistake error fault flaw flawed defective faulty problem trouble troubled troubling troublesome difficulty difficult
    struggle struggling burden obstacle setback complain complaint complaining criticize criticism blame accuse
    accusation argue argument conflict fight fighting war battle attack enemy kill killer murder die dead death deadly
    fatal sick sickness ill illness disease infection virus poison poisonous toxic pollution polluted waste wasted
    wasteful boring bored boredom dull tedious monotonous bland stale tasteless disappoint disappointed disappointing
    disappointment dissatisfied dissatisfaction unfortunate unfortunately unlucky unpleasant uncomfortable discomfort
    inconvenient nuisance mess messy chaos chaotic confused confusing confusion doubt doubtful suspicious distrust
    hesitate unreliable unstable uncertain insecure weak weakness fragile vulnerable inadequate insufficient lack
    scarce poverty starve starving hunger hungry debt bankrupt expensive overpriced slow sluggish noisy ugliness
    dark darkness cold harsh severe grim sour curse cursed nightmare nightmarish haunted ghost doom doomed unbearable
    intolerable unacceptable impossible never-ending negative pessimistic pessimism cynical reluctant refuse forbid
    punish punishment prison trap trapped victim abuse abusive bully bullying sorry alas ugh yuck damn hell awkward
    clumsy decay wither rusty shabby crumbling cramped dusty
    """.split()
)

NEGATORS = frozenset(
    """
    no not never none nobody nothing neither nor without cannot hardly barely
    don't doesn't didn't isn't aren't wasn't weren't can't couldn't won't wouldn't shouldn't haven't hasn't hadn't ain't
    """.split()
)

SECOND_PERSON = frozenset("you your yours yourself yourselves you're you've you'll you'd".split())
FIRST_PERSON = frozenset("i me my mine myself i'm i've i'll i'd".split())
FIRST_PERSON_PLURAL = frozenset("we us our ours ourselves let's we're we've we'll we'd".split())

HEDGES = frozenset(
    """
    maybe perhaps possibly probably presumably apparently seemingly arguably roughly approximately somewhat might may
    could seem appear suggest tend likely unlikely usually often sometimes generally typically largely partly relatively
    """.split()
)

CASUAL = frozenset(
    """
    hey hi yeah yep yup nope ok okay gonna wanna gotta kinda sorta stuff guys guy folks awesome cool super totally
    basically literally honestly anyway lol wow oops yay huh hmm bit lots tons buddy dude mom dad kids
    """.split()
)

FORMAL = frozenset(
    """
    therefore moreover furthermore consequently nevertheless nonetheless hence thus accordingly additionally whereas
    hereby regarding concerning pursuant notwithstanding sincerely respectfully kindly dear sir madam shall upon
    subsequently obtain require utilize facilitate ensure endeavor commence individual numerous sufficient
    """.split()
)


@cache
def stems(word: str) -> tuple[str, ...]:
    """`word` and what is left of it without a regular ending (-s, -es, -ed, -ing, -ly), most literal first."""
    found = [word]
    if word.endswith("'s"):
        found.append(word[:-2])
    for ending in ("s", "es", "d", "ed", "ing", "ly"):
        rest = word[: -len(ending)]
        if word.endswith(ending) and len(rest) >= 3:
            found += [rest, rest + "e"] if ending == "ing" else [rest]
            if rest.endswith("i"):
                found.append(rest[:-1] + "y")  # worries, cried
    return tuple(found)
