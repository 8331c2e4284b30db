"""TrainConfig, all settings of a run, and the runs that have a name: `python train_gpt2.py NAME`.

Hyper-parameters of llm.c's scripts/run_gpt2_{124M,350M,774M,1558M}.sh and run_gpt3_125M.sh; shapes
of GPT-2 (table 2) and GPT-3 (arXiv 2005.14165, table 2.1). micro_batch is what 80 GB hold.
shakespeare-char: nanoGPT's config/train_shakespeare_char.py, and its README for a CPU.
speedrun: modded-nanogpt's track 3, entry 36, with the skip and the momentum warm-up of record 9.
Other widths C: AdamW's rates times (C / 768)^-0.5 (nanochat).
"""

from dataclasses import asdict, dataclass, field, replace

from tyro.conf import OmitArgPrefixes

from data.config import VOCAB, DataConfig, fit_micro_batch
from eval.config import EvalConfig
from launch import cli, plan
from launch.config import SpikeConfig, TrackerConfig, WatchdogConfig, check_minutes, check_name
from launch.ranks import read_ranks
from model import size
from model.config import ComputeConfig, GPTConfig, OptimConfig, SavingConfig, check_diagnosable


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are GPT-2 124M on 10 billion tokens of FineWeb."""

    name: str = "gpt2-124m"
    """The run's folder inside out_dir."""
    out_dir: str = "runs"
    """Where runs live."""
    steps: int = 18_865
    """Optimizer steps: one epoch of FineWeb-10B (llm.c, scripts/run_gpt2_124M.sh)."""
    minutes: float = 0.0
    """Instead of --steps: as many as end in time, planned from the first ones' speed."""
    batch_tokens: int = 524_288
    """Tokens a step, over all ranks: 2^19, GPT-3's half a million."""
    micro_batch: int = 64
    """Sequences a rank computes at once, at most; the rest of its share is accumulated."""
    seed: int = 1337
    """Of the first weights and of the order of the data."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint; never: refuse a used folder; or a checkpoint."""
    init: str = ""
    """Weights for a new run: a checkpoint, a run folder, or hf:DIR (hf:gpt2: from the Hub)."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compute: OmitArgPrefixes[ComputeConfig] = field(default_factory=ComputeConfig)
    saving: OmitArgPrefixes[SavingConfig] = field(default_factory=SavingConfig)
    evaluation: OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)
    tracker: OmitArgPrefixes[TrackerConfig] = field(default_factory=TrackerConfig)
    spikes: OmitArgPrefixes[SpikeConfig] = field(default_factory=SpikeConfig)
    watchdog: OmitArgPrefixes[WatchdogConfig] = field(default_factory=WatchdogConfig)
    planning: OmitArgPrefixes[plan.PlanConfig] = field(default_factory=plan.PlanConfig)

    def check(self) -> None:
        """Raises BadInput for numbers that make no run."""
        cli.within("steps", self.steps, 1, cli.MOST_STEPS)
        cli.within("batch_tokens", self.batch_tokens, 1, 10**9)
        cli.within("micro_batch", self.micro_batch, 1)
        cli.within("seed", self.seed, 0, 2**32 - 1)
        self.data.check(self.model.n_vocab, self.init)  # n_vocab is GPT-2's; chat takes --init
        check_minutes(self)
        check_diagnosable(self.tracker.diagnose_every, self.model, self.optim)
        check_name(self.name)

    def check_surroundings(self) -> None:
        """Raises BadInput for a batch that these ranks can't share, and for data that isn't here.

        A run finds both out again, with all ranks together; this is before PyTorch is imported.
        """
        rank, ranks = read_ranks()
        fit_micro_batch(self.batch_tokens, ranks, self.model.n_ctx, self.micro_batch)
        if rank == 0:  # on another one nobody would hear of it
            self.data.check_present()

    def with_vocabulary(self, n_vocab: int) -> "TrainConfig":
        """The same with as many tokens as the data has: of a text by character, its characters."""
        return replace(self, model=replace(self.model, n_vocab=n_vocab))

    def show_plan(self) -> int:
        """Prints what --plan asks for. Returns the exit code."""
        config = self
        if self.data.vocab == "char" and self.model.n_vocab == VOCAB:  # no preset's own text
            from data.dataset import open_data  # it imports PyTorch

            config = self.with_vocabulary(open_data(self.data).tokenizer.n_vocab)
        return plan.show(
            asdict(config), size.parameters(config.model), size.flops_per_token(config.model))


SHAKESPEARE = DataConfig(dir="", text="shakespeare", vocab="char")
# The GELU is nanoGPT's; its missing biases aren't: GPT-2 has them everywhere, and so has this.
NANOGPT_SMALL = GPTConfig(
    n_layer=6, n_head=6, n_embd=384, n_ctx=256, n_vocab=65, gelu="exact", dropout=0.2)
NANOGPT_CPU = GPTConfig(n_layer=4, n_head=4, n_embd=128, n_ctx=64, n_vocab=65, gelu="exact")
SPEEDRUN = OptimConfig(
    optimizer="muon", schedule="wsd", decay_ratio=0.7, lr=0.025, warmup_steps=0, weight_decay=0.05,
    beta1=0.8, beta2=0.95, eps=1e-10, clip=0)


def speedrun(lr: float, C: int) -> OptimConfig:
    """The speedrun's optimizer at another width, with this rate of Muon's."""
    rates = {name: round(getattr(SPEEDRUN.muon, name) * (C / 768) ** -0.5, 5)
             for name in ("embed_lr", "head_lr", "vector_lr")}
    return replace(SPEEDRUN, lr=lr, muon=replace(SPEEDRUN.muon, **rates))


PRESETS = {
    "demo": TrainConfig(  # for four minutes on two CPU cores; one seed did not bear 6e-3
        name="demo", steps=900, batch_tokens=1024, micro_batch=8,
        model=GPTConfig(n_layer=4, n_head=2, n_embd=128, n_ctx=128),
        optim=OptimConfig(lr=4e-3, warmup_steps=120, weight_decay=0.02, beta2=0.995),
        data=DataConfig(dir=""), saving=SavingConfig(save_every=450),
        evaluation=EvalConfig(eval_every=225, prompt="In the beginning", hellaswag="off")),
    "gpt2-124m": TrainConfig(),
    "gpt2-350m": TrainConfig(name="gpt2-350m", steps=60_000, micro_batch=32,
        model=GPTConfig(n_layer=24, n_head=16, n_embd=1024), optim=OptimConfig(lr=3e-4)),
    "gpt2-774m": TrainConfig(name="gpt2-774m", steps=286_102, micro_batch=16,
        model=GPTConfig(n_layer=36, n_head=20, n_embd=1280), optim=OptimConfig(lr=2.5e-4)),
    "gpt2-1558m": TrainConfig(name="gpt2-1558m", steps=32_000, batch_tokens=2**20, micro_batch=8,
        model=GPTConfig(n_layer=48, n_head=25, n_embd=1600), optim=OptimConfig(final_lr=0.1)),
    "gpt3-125m": TrainConfig(name="gpt3-125m", steps=572_204, micro_batch=32,
        model=GPTConfig(n_ctx=2048), optim=OptimConfig(final_lr=0.1)),
    "shakespeare-char": TrainConfig(  # published: 1.4697, the best of its estimates
        name="shakespeare-char", steps=5_000, batch_tokens=64 * 256, micro_batch=64,
        model=NANOGPT_SMALL, data=SHAKESPEARE, saving=SavingConfig(save_every=250),
        optim=OptimConfig(lr=1e-3, final_lr=0.1, warmup_steps=100, beta2=0.99),
        evaluation=EvalConfig(eval_every=250, prompt="ROMEO:", hellaswag="off")),
    "shakespeare-char-cpu": TrainConfig(  # published: 1.88 in about three minutes
        name="shakespeare-char-cpu", steps=2_000, batch_tokens=12 * 64, micro_batch=12,
        model=NANOGPT_CPU, data=SHAKESPEARE, saving=SavingConfig(save_every=1_000),
        optim=OptimConfig(lr=1e-3, final_lr=0.1, warmup_steps=100, beta2=0.99),
        compute=ComputeConfig(dtype="fp32"),
        evaluation=EvalConfig(eval_every=250, prompt="ROMEO:", hellaswag="off")),
    "speedrun": TrainConfig(  # published: 3.2787 on FineWeb, the mean of ten runs of its recipe
        name="speedrun", steps=3_250, optim=SPEEDRUN,
        model=GPTConfig(arch="speedrun", n_head=6)),
    "speedrun-350m": TrainConfig(  # a guess: 2.92 was reached with 3.9 B tokens of 64 K context
        name="speedrun-350m", steps=12_000, micro_batch=32, optim=speedrun(0.02, 1024),
        model=GPTConfig(arch="speedrun", n_layer=24, n_head=8, n_embd=1024)),
    "speedrun-1.5b": TrainConfig(  # 2.7297 was published for a network much like it
        name="speedrun-1.5b", steps=20_344, batch_tokens=480 * 1024, micro_batch=8,
        optim=speedrun(0.007, 1536),
        model=GPTConfig(arch="speedrun", n_layer=52, n_head=12, n_embd=1536)),
    "speedrun-demo": TrainConfig(  # demo's size, data and steps
        name="speedrun-demo", steps=900, batch_tokens=1024, micro_batch=8,
        model=GPTConfig(arch="speedrun", n_layer=4, n_head=2, n_embd=128, n_ctx=128),
        optim=speedrun(0.02, 128), data=DataConfig(dir=""), saving=SavingConfig(save_every=450),
        evaluation=EvalConfig(eval_every=225, prompt="In the beginning", hellaswag="off")),
}
