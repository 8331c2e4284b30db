"""A run's folder: what it says of itself in config.json, and whether a start may go on in it.

    OUT_DIR/NAME/config.json      everything resolved; `train_gpt2.py config.json` starts it again
                 metrics.jsonl    launch/tracker.py
                 checkpoints/     model/checkpoint.py
                 report/          pictures, and the page of eval/report
"""

import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from launch import cli, console
from launch.errors import BadInput
from launch.files import atomic_write
from launch.signals import remove_stopped_file
from launch.tracker import cut_after, read_rows
from launch.world import World, device_name

PACKAGES = ("torch", "triton", "numpy", "tiktoken", "safetensors", "tyro")
ROOT = Path(__file__).parent.parent

# What may not change between a run and its continuation, beside the data.
MUST_MATCH = ("model", "optim", "steps", "batch_tokens", "seed")
# Settings that are younger than some runs, and what those runs did.
BEFORE_IT_WAS_SET = {"model.gelu": "tanh", "model.arch": "gpt2", "optim.optimizer": "adamw",
                     "optim.schedule": "cosine", "model.dropout": 0.0}
WITHOUT_EFFECT_THEN = ("optim.decay_ratio", "optim.muon.", "model.value_embeddings",
                       "model.document_mask")  # on a run that says nothing of them
# Ranks that disagree on these would wait for each other, or compute different things. Where data
# lie may be called otherwise on another node: what is found there is compared (data/dataset.py).
SAME_ON_ALL_RANKS = (*MUST_MATCH, "name", "minutes", "micro_batch", "compute", "saving",
                     "evaluation", "spikes")


def same_on_all_ranks(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that all ranks have to agree on, by their flags; of those that name a place,
    whether they do."""
    settings = {}
    for name, value in flatten({key: config[key] for key in SAME_ON_ALL_RANKS}).items():
        group, _, bare = name.partition(".")
        settings["--" + (bare if group in cli.BARE else name)] = value
    if settings["--hellaswag"] not in ("auto", "off"):
        settings["--hellaswag"] = "a file"
    settings["--diagnose_every"] = config["tracker"]["diagnose_every"]
    settings["--init"] = "given" if config["init"] else "not given"
    return settings


def describe(
    config: dict[str, Any], world: World, data: dict[str, str], characters: str, **resolved: Any
) -> dict[str, Any]:
    """What config.json will hold: the configuration, what "auto" became, code, packages, hardware;
    and the characters that tokens stand for, if they aren't GPT-2's.

    data: "training data" and "validation data", each a fingerprint. Writes nothing: prepare() does.
    """
    weights = "fp64" if resolved["dtype"] == "fp64" else "fp32"
    same = {key: config[key] for key in MUST_MATCH}
    vocabulary = {"characters": characters} if characters else {}
    return {
        "config": config,
        **vocabulary,
        "must_match": same | data | {"weights": weights},
        "resolved": resolved,
        "code": code_version(),
        "command": sys.argv,
        "packages": {"python": platform.python_version(), **package_versions()},
        "hardware": {"device": device_name(world.device), "ranks": world.size},
    }


def prepare(path: Path, description: dict[str, Any], last_step: int) -> list[dict[str, Any]]:
    """Writes config.json, drops what a stop left behind and metrics past the step `last_step`.

    Returns the rows with a validation loss, whose steps need no second evaluation.
    """
    remove_stopped_file(path)
    atomic_write(path / "config.json", json.dumps(description, indent=2) + "\n")
    cut_after(path / "metrics.jsonl", last_step)
    return [row for row in read_rows(path / "metrics.jsonl") if "val_loss" in row]


def change_steps(run: Path, steps: int, warmup_steps: int, resolved: dict[str, Any]) -> None:
    """Writes into a run's config.json with how many steps it goes on (model/pace.py).

    resolved: what follows from them.
    """
    description = json.loads((run / "config.json").read_bytes())
    for settings in (description["config"], description["must_match"]):
        settings["steps"] = steps
        settings["optim"]["warmup_steps"] = warmup_steps
    description["config"]["minutes"] = 0.0
    description["resolved"] |= resolved
    atomic_write(run / "config.json", json.dumps(description, indent=2) + "\n")


def kernels_kept(checkpoint: Path, asked: str, device: str | None) -> dict[str, str]:
    """Who computed what in the run of a checkpoint, if that was chosen as it is now: for the same
    --kernels, on the same kind of card (None: on any). Else {}, and implementations are compared
    anew."""
    try:
        saved = json.loads((checkpoint / "config.json").read_bytes())
        before = saved["config"]["compute"]["kernels"], saved["hardware"]["device"]
        kept = saved["resolved"].get("kernels", {})
        return dict(kept) if before == (asked, device or before[1]) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of an older version, say
        return {}


def summary(description: dict[str, Any], T: int) -> str:
    """Three lines on what is about to happen."""
    config, resolved = description["config"], description["resolved"]
    ranks, device = description["hardware"]["ranks"], description["hardware"]["device"]
    mps = "\n" + console.warning("this was never tested on Apple's MPS")
    return (
        f"{config['name']}: {resolved['parameters']:,} parameters on {ranks} x {device}, "
        f"{resolved['dtype']}{', compiled' * resolved['compile']}"
        f"{how_gradients_travel(config['compute']['reduce_dtype'], ranks)}\n"
        f"{config['batch_tokens']:,} tokens a step: {ranks} ranks x {resolved['accumulation']} "
        f"micro-steps x {resolved['micro_batch']} sequences x {T} (micro-batch "
        f"{why_micro_batch(config['micro_batch'], resolved)})\n"
        f"trains on {description['must_match']['training data']}, {resolved['epochs']:.2f} epochs; "
        f"validates on {resolved['val_set']}"
        + mps * (device == "Apple MPS")
    )


def how_gradients_travel(reduce_dtype: str, ranks: int) -> str:
    """What --reduce_dtype does, where it isn't the default."""
    if reduce_dtype == "fp32":
        return ""
    if ranks == 1:
        return f", --reduce_dtype {reduce_dtype} without effect: gradients of one rank stay here"
    return f", gradients sent in {reduce_dtype}"


def why_micro_batch(asked: int, resolved: dict[str, Any]) -> str:
    """Where a rank's number of sequences at once comes from."""
    chosen, share = resolved["micro_batch"], resolved["micro_batch"] * resolved["accumulation"]
    if chosen == asked:
        return f"{chosen}: as --micro_batch says"
    if chosen == share:
        return f"{chosen}: a rank has no more; --micro_batch allows {asked}"
    return f"{chosen}: the largest up to --micro_batch {asked} that divides a rank's {share:,}"


def code_version() -> str:
    """The commit this runs from, with -dirty where files were changed; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def package_versions() -> dict[str, str]:
    """The versions of the packages whose change could change a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 12}} -> {"model.n_layer": 12}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def require_same_run(checkpoint: Path, asked: dict[str, Any], in_decay: bool = False) -> None:
    """Raises BadInput that lists what differs between a checkpoint's config.json and this run's.

    Under wsd and constant more steps may be asked, of a checkpoint from before the decay; in_decay:
    of a later one, too (model/longer.py).
    """
    try:
        saved = json.loads((checkpoint / "config.json").read_bytes())
        before = saved["config"]["init"] or "none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{checkpoint / 'config.json'} is no run's ({error!r}): --init {checkpoint} "
                       "starts anew from its weights") from None
    old, new = flatten(saved.get("must_match", {})), flatten(asked["must_match"])
    for key in BEFORE_IT_WAS_SET.keys() & new.keys():
        old.setdefault(key, BEFORE_IT_WAS_SET[key])
    for key in new.keys() - old.keys():
        if key.startswith(WITHOUT_EFFECT_THEN):
            old[key] = new[key]
    if not asked["config"].get("data", {}).get("val_text"):  # runs older than this flag don't say
        old.setdefault("validation data", new.get("validation data"))
    more_steps = new.get("steps", 0) > old.get("steps", 0)
    schedule = new.get("optim.schedule")
    longer = more_steps and schedule == old.get("optim.schedule") != "cosine"
    if longer:
        old["steps"] = new["steps"]
    different = [
        f"{key} {old.get(key)} there, {new.get(key)} asked"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    init = asked["config"]["init"]
    if init and init != before:
        different.append(f"init {before} there, {init} asked")
    # A preset's warm-up is scaled with --steps: it isn't what was asked to be different.
    names = {line.split(" ")[0] for line in different}
    if more_steps and names == {"optim.warmup_steps"}:
        raise BadInput(f"{checkpoint} is of a run that warms up for {old['optim.warmup_steps']} "
                       f"steps, and --steps {new['steps']} scales the preset's to "
                       f"{new['optim.warmup_steps']}: add --optim.warmup_steps "
                       f"{old['optim.warmup_steps']}, or name the run's folder, not the preset")
    if names in ({"steps"}, {"steps", "optim.warmup_steps"}):
        raise BadInput(
            f"{checkpoint} is of a run of {old.get('steps')} steps, and {new['steps']} are asked: "
            + ("a cosine falls towards its last step, and can't be stretched afterwards (wsd and "
               "constant can). " if more_steps else "fewer can't be gone on with. ")
            + f"--name OTHER --init {checkpoint} starts anew from its weights")
    if different:
        raise BadInput(
            f"{checkpoint} belongs to another run: {'; '.join(different)}. {_go_on(checkpoint)}"
            "Choose another --name for a new run (with --init to start from these weights)"
        )
    if longer:
        _require_full_rate(checkpoint, saved, in_decay)


def _require_full_rate(checkpoint: Path, saved: dict[str, Any], in_decay: bool) -> None:
    """Raises BadInput for a checkpoint out of a decay: a longer run has other steps from there."""
    start = saved.get("resolved", {}).get("decay_start", -1)
    try:
        step = json.loads((checkpoint / "state.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a damaged one, or one without training state: refused when it's loaded
    if step > start and not in_decay:
        raise BadInput(f"{checkpoint} is of a decay that began after step {start}: a run with more "
                       "steps goes on from a checkpoint before it")


def _go_on(checkpoint: Path) -> str:
    """How to go on with a checkpoint's run as it was started, if its folder is still around it."""
    run = checkpoint.resolve().parent.parent
    if not (run / "config.json").exists() or checkpoint.parent.name != "checkpoints":
        return ""
    if run.is_relative_to(Path.cwd()):
        run = run.relative_to(Path.cwd())
    return (f"`python train_gpt2.py {shlex.quote(str(run))}` goes on with it and the settings "
            f"in {run / 'config.json'}. ")
