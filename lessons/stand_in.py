"""Bands of figures where the embedded text stands in for the lectures': lessons 2 and 4 to 8.

    BANDS["04"]["original: first loss"]  # (25.9026, 25.9026)

By lesson and the name that it prints; an indented figure hangs on the one above it. What is drawn
and computed in a fixed order is exact. What a training ends at was measured once, with the
lesson's seed, and its band is as wide as the one on the lecture's text, which several seeds gave,
or where that text has exact figures (lesson 4's batches) some 1 % wide, by choice.
Figures that are the same on any text, or that have a band of their own beside them, aren't here.
"""

Bands = dict[str, tuple[float, float]]  # figure -> lowest, highest


BANDS: dict[str, Bands] = {
    "02": {
        "count of n.": (898, 898),
        "count of a.": (289, 289),
        "count of an": (873, 873),
        "pairs that never occur, of 729": (188, 188),
        "the same, 1 added to each count": (2.49262, 2.49262),
        "andrejq, in which q follows j": (3.7854, 3.7854),
    },
    "04": {
        "training examples": (76_856, 76_856),
        "original: first loss": (25.9026, 25.9026),
        "original: first loss  % of hidden units saturated": (61.86, 61.86),
        "original: first loss  dev after 50,000 steps": (2.191, 2.211),
        "softmax not confidently wrong: first loss": (3.3084, 3.3084),
        "softmax not confidently wrong: first loss  % of hidden units saturated": (61.86, 61.86),
        "softmax not confidently wrong: first loss  dev after 50,000 steps": (2.145, 2.162),
        "tanh not saturated: first loss": (3.3097, 3.3097),
        "tanh not saturated: first loss  % of hidden units saturated": (1.87, 1.88),
        "tanh not saturated: first loss  dev after 50,000 steps": (2.089, 2.103),
        "Kaiming: first loss": (3.3109, 3.3109),
        "Kaiming: first loss  % of hidden units saturated": (10.15, 10.16),
        "Kaiming: first loss  dev after 50,000 steps": (2.101, 2.116),
        "BatchNorm: loss of batch 0": (3.3038, 3.3038),
        "BatchNorm: loss of batch 10,000": (2.59, 2.61),
        "BatchNorm: loss of batch 20,000": (2.164, 2.185),
        "BatchNorm: loss of batch 30,000": (2.117, 2.138),
        "BatchNorm: loss of batch 30,000  dev after 50,000 steps": (2.105, 2.120),
        "no BatchNorm, gain 1.7: std of layer 1": (0.76, 0.76),
        "no BatchNorm, gain 1.7: std of layer 5": (0.66, 0.66),
        "no BatchNorm, gain 1: std of layer 1": (0.63, 0.63),
        "no BatchNorm, gain 1: std of layer 5": (0.32, 0.32),
        "no BatchNorm, gain 0.5: std of layer 1": (0.42, 0.42),
        "no BatchNorm, gain 0.5: std of layer 5": (0.02, 0.02),
        "no BatchNorm, gain 3: std of layer 1": (0.86, 0.86),
        "no BatchNorm, gain 3: std of layer 5": (0.84, 0.84),
        "first loss": (3.2810, 3.2810),
        "train after 1,001 steps": (2.431, 2.434),
        "dev after 1,001 steps": (2.4338, 2.4367),
        "layer 1: std": (0.63, 0.64),
        "layer 1: std  % saturated": (2.9, 3.2),
        "layer 1: std  std of its gradient, in 1e-3": (2.51, 2.56),
        "layer 2: std": (0.64, 0.65),
        "layer 2: std  % saturated": (2.45, 2.75),
        "layer 2: std  std of its gradient, in 1e-3": (2.3, 2.35),
        "layer 3: std": (0.65, 0.66),
        "layer 3: std  % saturated": (2.45, 2.75),
        "layer 3: std  std of its gradient, in 1e-3": (2.13, 2.18),
        "layer 4: std": (0.65, 0.66),
        "layer 4: std  % saturated": (1.7, 1.95),
        "layer 4: std  std of its gradient, in 1e-3": (1.91, 1.96),
        "layer 5: std": (0.66, 0.67),
        "layer 5: std  % saturated": (1.35, 1.6),
        "layer 5: std  std of its gradient, in 1e-3": (2.01, 2.06),
        "(27, 10): gradient : data, in 1e-3": (7.25, 7.45),
        "(30, 100): gradient : data, in 1e-3": (52.0, 53.4),
        "(100, 100): gradient : data, in 1e-3": (53.4, 79.9),  # four of them: 79, 65, 59 and 54
        "(100, 27): gradient : data, in 1e-3": (118.5, 120.8),
    },
    "05": {
        "loss": (3.3855, 3.3855),
        "the same, biased": (2.3e-5, 2.5e-5),
        "first loss": (3.8700, 3.8700),
        "train, 50,000 steps": (2.021, 2.051),
        "dev, 50,000 steps": (2.097, 2.127),
    },
    "06": {
        "training examples": (76_856, 76_856),
        "flat, 3 letters: parameters  first loss": (3.3043, 3.3043),
        "flat, 8 letters: parameters  first loss": (3.3238, 3.3238),
        "tree, statistics by place (the bug): parameters  first loss": (3.2925, 3.2925),
        "tree: parameters  first loss": (3.2919, 3.2919),
        "larger tree: parameters  first loss": (3.2955, 3.2955),
        "larger tree: parameters  batch 10,000": (2.1867, 2.2068),
        "larger tree: parameters  batch 20,000": (1.4391, 1.4592),
        "larger tree: parameters  train after 30,000 steps": (1.734, 1.77),
        "larger tree: parameters  dev after 30,000 steps": (1.995, 2.028),
    },
    "07": {
        "bigram": (2.31, 2.37),
        "one head": (2.169, 2.229),
        "four heads": (2.0, 2.061),
        "feed-forward": (1.974, 2.034),
        "three blocks": (1.757, 1.817),
        "with LayerNorm": (1.753, 1.813),
        "as GPT-2": (1.724, 1.784),
    },
    "08": {"verse held out, nats a symbol": (1.82, 1.90)},  # all others: the lesson's own bands
}
