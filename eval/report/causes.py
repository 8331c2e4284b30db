"""Why a run leaves a published curve: what its own record shows, then what it mostly is.

The cases are those of the threads that are named: build-nanogpt's, nanoGPT's and llm.c's issues.
"""

from typing import Any

from eval.report.curves import EARLY_UNTIL, Curve
from eval.report.record import Record

EVENTS_SHOWN = 5


def different_settings(record: Record, curve: Curve) -> list[str]:
    """A sentence on the settings in which a run differs from the published one; none if alike."""
    config = record.config
    if not config:
        return ["There is no config.json: whether the settings are the published run's is unknown."]
    model, optim = record.settings("model"), record.settings("optim")
    pairs: list[tuple[str, Any, Any]] = []  # setting, this run's value, the published run's
    for key, value in curve.model.items():
        pairs.append((key, model.get(key), value))
    pairs.append(("batch_tokens", config.get("batch_tokens"), curve.batch_tokens))
    for key in ("lr", "warmup_steps", "weight_decay"):
        pairs.append((key, optim.get(key), getattr(curve, key)))
    found = []
    for key, value, published in pairs:
        if value != published:
            found.append(f"{key} {value} ({published})")
    steps, batch_tokens = config.get("steps"), config.get("batch_tokens")
    if isinstance(steps, int) and isinstance(batch_tokens, int):
        planned, published = steps * batch_tokens, curve.steps * curve.batch_tokens
        if abs(planned / published - 1) > 0.05:  # 18,865 steps and the log's 19,560 are alike
            found.append(f"{planned / 1e9:.3g} B tokens planned ({published / 1e9:.3g} B), so the "
                         "learning rate falls at another pace")
    if config.get("init"):
        found.append(f"weights of {config['init']} at the start (none)")
    if not found:
        return []
    return [f"Settings that differ from the published run's (in brackets): {'; '.join(found)}."]


def usual_causes(
    record: Record, before: int, first: int, *, tokens: float, difference: float, sudden: bool
) -> list[str]:
    """What to look at, most telling first.

    The run was right at step `before` (0: never judged) and off at `first`, after `tokens`.
    difference: at the newest step, above 0 where it is worse; sudden: it left in one jump.
    """
    causes = []
    events = [event for event in record.events() if before < event.step <= first]
    if events:
        lines = [f"step {event.step:,}: {event.text}" for event in events[:EVENTS_SHOWN]]
        if len(events) > EVENTS_SHOWN:
            lines.append(f"and {len(events) - EVENTS_SHOWN} more")
        causes.append(f"What happened between the last good evaluation and step {first:,}: "
                      f"{'; '.join(lines)}.")
    if difference < 0:
        return causes + BETTER
    if sudden and before:
        causes += SUDDEN
    if tokens <= EARLY_UNTIL:
        return causes + EARLY
    return causes + LATE


BETTER = [
    "A shorter schedule: the learning rate falls earlier, and the loss with it.",
    "Validation text inside the training text, or another validation set under the same name.",
    "Another model, context length or optimizer than the published run's.",
]
SUDDEN = [
    "A spike that the run didn't recover from: gradient norm and loss at that step; go back to the "
    "checkpoint before it.",
    "Damaged data: python -m data.shards verify DIR.",
]
EARLY = [
    "Gradients that aren't averaged over micro-steps and ranks, or synchronised too early: "
    "build-nanogpt's issue 30 stood at 4.88 instead of 4.15 at step 1,000.",
    "Learning rate, warm-up or tokens a step other than the published run's.",
    "A number format that loses small gradients: fp16 without a scaler, bf16 weights.",
]
LATE = [
    "The same text again: shards that repeat or overlap between ranks (llm.c's issue 792), more "
    "epochs than one (config.json, resolved.epochs).",
    "Data in the order of their source: the loss then rises and falls with it "
    "(modded-nanogpt's issue 174).",
    "Learning rate or weight decay other than the published run's: the schedule's end matters "
    "most.",
    "fp16 that skips many steps (nanoGPT's issues 136 and 215).",
]
