"""The floor of a step: the matrix-product operations that no engine can leave out, counted from shapes and rows.

Counted once: a prompt for all its completions, a (prompt, completion) pair that is trained and also serves as a KL pair,
the logits of a prompt's last row. Not counted: recomputing, element-wise work, the reference pass (a run makes it once).
Of the last block only keys and values are needed for rows that no head reads; the first block needs no gradient of its
input; a KL completion has no backward pass. A multiplication and an addition are two operations.
"""

RANK = 16


def pairs_of_step(lengths, step, batch):
    """(trained, kl) of a step: lists of (prompt id, prompt tokens, completion id, completion tokens). KL partners as in TRL:
    the completion of the row before; where a step has one row, a completion of another step."""
    if batch == 1:
        row = lengths[step]
        return [pair(row, row)], [pair(row, lengths[step - 1])]
    rows = lengths[step * batch : (step + 1) * batch]
    return [pair(r, r) for r in rows], [pair(r, rows[i - 1]) for i, r in enumerate(rows)]


def pair(row, partner):
    return row["prompt_id"], row["prompt"], partner["id"], partner["completion"]


def lengths_of(records):
    """Token counts of records as workload.py writes them: a word a token, and the end of text."""
    prompts = {}
    return [
        {"id": i, "prompt_id": prompts.setdefault(r["prompt"], len(prompts)), "prompt": len(r["prompt"].split()),
         "completion": len(r["completion"].split()) + 1}
        for i, r in enumerate(records)
    ]


class Rows:
    """Token rows of a set of branches over shared prompts: all, those that predict, and the keys they see."""

    def __init__(self, branches):
        prompts = {b[0]: b[1] for b in branches}
        self.all = sum(prompts.values()) + sum(b[3] for b in branches)
        # The last row of a prompt predicts the first token of every completion; a completion's last row predicts nothing.
        self.predicting = len(prompts) + sum(b[3] - 1 for b in branches)
        self.keys = sum(p * (p + 1) // 2 for p in prompts.values())
        self.keys += sum(c * p + c * (c + 1) // 2 for _, p, _, c in branches)
        self.keys_predicting = sum(prompts.values()) + sum((c - 1) * p + c * (c - 1) // 2 for _, p, _, c in branches)


def step(shape, trained, kl):
    """Operations of one optimizer step, by part."""
    own = {(b[0], b[2]) for b in trained}
    kl = list({(b[0], b[2]): b for b in kl if (b[0], b[2]) not in own}.values())
    forward, backward = Rows(trained + kl), Rows(trained)
    linears = shape.linears()
    both = shape.hidden * shape.vocab
    parts = dict.fromkeys(("forward", "backward", "lora", "attention", "head"), 0)
    parts["head"] = 2 * both * (forward.predicting + backward.predicting)
    for layer in range(shape.layers):
        first, last = layer == 0, layer == shape.layers - 1
        for name, inputs, outputs in linears:
            thin = last and name[10:] not in ("k_proj", "v_proj")
            f = forward.predicting if thin else forward.all
            b = backward.predicting if thin else backward.all
            needs_input = not (first and name[10:] in ("q_proj", "k_proj", "v_proj"))
            parts["forward"] += 2 * inputs * outputs * f
            parts["backward"] += 2 * inputs * outputs * b * needs_input
            # Forward x·A·B; backward: both gradients, dy·B, and its product with A.
            parts["lora"] += 2 * RANK * (inputs + outputs) * f
            parts["lora"] += 2 * RANK * (inputs + 2 * outputs + inputs * needs_input) * b
        width = shape.heads * shape.head_dim
        # Forward scores and weighted values; backward four products of the same size.
        parts["attention"] += 4 * width * (forward.keys_predicting if last else forward.keys)
        parts["attention"] += 8 * width * (backward.keys_predicting if last else backward.keys)
    parts["total"] = sum(parts.values())
    return parts


def steps(shape, records, batch):
    """Operations of every step of a run in file order."""
    lengths = lengths_of(records)
    return [step(shape, *pairs_of_step(lengths, i, batch)) for i in range(len(records) // batch)]
