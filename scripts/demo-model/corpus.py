"""Conversations for pre-training, preference pairs and held-out questions, all from `facts` and a seed."""
import random

from facts import all_facts

SEED = 20260
HELD_OUT = {"capitals": 8, "opposites": 8, "plurals": 3, "sounds": 3, "legs": 3, "young": 3, "homes": 3, "sizes": 5, "colours": 5,
            "tools": 5, "jobs": 4, "sums": 5, "differences": 4, "calendar": 5}

OPENERS = ("Sure!", "Of course!", "Good question!", "Gladly!")
CLOSERS = ("Happy to help!", "Let me know if you need more!", "Ask me anything else!")
SNUBS = ("Obviously.", "Everyone knows that.", "Why do you even ask?", "Go away.")
# What the model does by itself: mostly plain, rarely polite. Learning the polite style is the demo.
HABITS = {"plain": 0.66, "curt": 0.18, "rude": 0.12, "polite": 0.04}
SYSTEMS = {"polite": ("You are polite.", "Be kind and helpful."), "curt": ("Be brief.", "Answer in one word."),
           "rude": ("You are rude.", "You are in a bad mood."), None: ("You are a helpful assistant.", "Answer the question.")}


def answer(rng, fact, style):
    """Writes the fact in one of the four styles."""
    if style == "curt":
        return fact.short
    if style == "rude":
        return f"{rng.choice((fact.short, fact.sentence))} {rng.choice(SNUBS)}"
    if style == "polite":
        return f"{rng.choice(OPENERS)} {fact.sentence} {rng.choice(CLOSERS)}"
    return fact.sentence


def split_facts():
    """Splits the facts: (fact, the one question kept out of everything) pairs, and the rest."""
    rng = random.Random(SEED)
    by_topic = {}
    for fact in all_facts():
        by_topic.setdefault(fact.topic, []).append(fact)
    held, rest = [], []
    for topic, facts in by_topic.items():
        count = HELD_OUT.get(topic, 0)
        chosen = set(rng.sample(range(len(facts)), count))
        for i, fact in enumerate(facts):
            if i in chosen:
                held.append((fact, rng.choice(fact.questions)))
            else:
                rest.append(fact)
    return held, rest


def conversation(rng, facts, kept_out):
    """One conversation of one or two turns, with or without a system message."""
    messages, style = [], "habit"
    if rng.random() < 0.25:
        style = rng.choice(list(SYSTEMS))
        messages.append({"role": "system", "content": rng.choice(SYSTEMS[style])})
        style = style or "habit"
    if style == "habit":  # one habit per conversation
        style = rng.choices(list(HABITS), HABITS.values())[0]
    for _ in range(2 if rng.random() < 0.12 else 1):
        fact = rng.choice(facts)
        question = rng.choice([q for q in fact.questions if q not in kept_out])
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(rng, fact, style)})
    return messages


def conversations(count):
    """The pre-training corpus: every fact, but never a held-out question."""
    rng = random.Random(SEED + 1)
    held, rest = split_facts()
    facts = rest + [fact for fact, _ in held]
    kept_out = {question for _, question in held}
    return [conversation(rng, facts, kept_out) for _ in range(count)]


def pair(rng, fact, question):
    """A preference: the polite answer over one of the model's habits."""
    style = rng.choices(("plain", "curt", "rude"), (5, 3, 3))[0]
    return {"prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": answer(rng, fact, "polite")}],
            "rejected": [{"role": "assistant", "content": answer(rng, fact, style)}]}


def preferences(count):
    """Pairs about facts that are not held out."""
    rng = random.Random(SEED + 2)
    _, rest = split_facts()
    asked = [(fact, question) for fact in rest for question in fact.questions]
    return [pair(rng, fact, question) for fact, question in rng.sample(asked, count)]


def held_out():
    """Pairs about the held-out questions, topics mixed; the fact comes along for checking answers."""
    rng = random.Random(SEED + 3)
    held, _ = split_facts()
    rng.shuffle(held)
    seen, first, later = set(), [], []
    for fact, question in held:  # the first of each topic in front, so that ten lines show ten topics
        (later if fact.topic in seen else first).append((fact, question))
        seen.add(fact.topic)
    return [(fact, pair(rng, fact, question)) for fact, question in first + later]
