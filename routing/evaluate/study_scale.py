"""How large a study of all routers inside the model is, on a GPU and on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

SMALL, MEDIUM = "small", "medium"
"""Groups of tasks."""


@dataclass(frozen=True)
class Loop:
    """Steps of a training, and the rows of each."""

    steps: int
    rows: int

    @property
    def options(self) -> tuple[str, ...]:
        return "--steps", str(self.steps), "--batch-size", str(self.rows)


@dataclass(frozen=True)
class Variant:
    """Gates that are trained otherwise than the main ones: with other options, or a loop of their own."""

    name: str
    label: str
    options: tuple[str, ...] = ()
    loop: Loop | None = None
    group: str = SMALL

    @property
    def joint(self) -> bool:
        """Whether their adapters are trained along: they are others than those of the main ones then."""
        return "--joint" in self.options


@dataclass(frozen=True)
class Scale:
    """How much is done.

    `gates`, `moa` and `milora` are the trainings of each kind, judged by `judged` validation rows a task. Of each small
    task `rows` test rows are asked (None: all), `moa_rows` and `milora_rows` under routers by prompt; of composite
    prompts `composite_rows` of each of the `composite_sizes`. `curve`: training rows a task of further MeteoRA routers.
    `variants`: MeteoRA routers beside the main ones. `modules`: numbers of linears that MiLoRA chooses in place of its
    own. `new`: tasks that join a router which was trained without them. `whole`: also what takes a training of its own
    beyond the main ones: other seeds and packs, a swapped adapter, one LoRA for all tasks, MoE-LoRA, poolings,
    activations, the medium tasks.
    """

    device: str
    precision: str
    gates: Loop
    moa: Loop
    milora: Loop
    rows: int | None
    moa_rows: int
    milora_rows: int
    composite_rows: int
    composite_sizes: str
    judged: int
    merges: str
    few_merges: str
    moa_merges: str
    temperatures: str
    modules: tuple[int, ...]
    coefficients_every: int
    batch: int
    batch_tokens: int
    curve: tuple[int, ...] = ()
    new: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    whole: bool = False


WHITE = ("--white", "--learning-rate", "1e-2")
"""Of rates from 5e-4 to 1e-2, that at which gates of single linears were right most often after 300 steps."""

REWORDED = ("--reworded", "0.5")
"""The share that was measured."""

SCALES = {
    "cuda": Scale(
        device="cuda",
        precision="auto",
        gates=Loop(300, 32),
        moa=Loop(300, 32),
        milora=Loop(600, 32),
        rows=None,
        moa_rows=60,
        milora_rows=60,
        composite_rows=60,
        composite_sizes="3,5,10",
        judged=50,
        merges="cat,linear,linear:sum,svd,ties:0.5,ties:sum:0.5,dare_ties:0.5,dare_ties:sum:0.5",
        few_merges="cat,ties:sum:0.5",
        moa_merges="cat,linear:sum,svd,ties:sum:0.5",
        temperatures="1,4,15,30",
        modules=(1, 2, 4, 5, 6, 7),
        coefficients_every=5,
        batch=384,
        batch_tokens=4096,
        curve=(5, 20, 50, 200),
        new=("spell", "sentiment", "scan"),
        variants=(
            Variant("white", "white", WHITE),
            Variant("white-longer", "white, 900 steps", WHITE, Loop(900, 32)),
            Variant("reworded-longer", "white, reworded, 900 steps", (*WHITE, *REWORDED), Loop(900, 32)),
            Variant("longer", "900 steps", loop=Loop(900, 32)),
            Variant("faster", "rate 2e-2", ("--learning-rate", "2e-2")),
            Variant("joint-longer", "white, joint, 900 steps", (*WHITE, "--joint"), Loop(900, 32)),
            Variant("both-longer", "white, reworded, joint, 900 steps", (*WHITE, *REWORDED, "--joint"), Loop(900, 32)),
            *(Variant(f"beta-{beta}", f"beta {beta}", ("--beta", str(beta))) for beta in (0, 1, 20, 50)),
            Variant("medium-white-longer", "white, 900 steps", WHITE, Loop(900, 32), MEDIUM),
            Variant("medium-reworded-longer", "white, reworded, 900 steps", (*WHITE, *REWORDED), Loop(900, 32), MEDIUM),
            Variant(
                "medium-both-longer",
                "white, reworded, joint, 900 steps",
                (*WHITE, *REWORDED, "--joint"),
                Loop(900, 32),
                MEDIUM,
            ),
        ),
        whole=True,
    ),
    "cpu": Scale(
        device="cpu",
        precision="bfloat16",
        gates=Loop(160, 11),
        moa=Loop(40, 22),
        milora=Loop(24, 22),
        rows=30,
        moa_rows=30,
        milora_rows=10,
        composite_rows=12,
        composite_sizes="3",
        judged=20,
        merges="cat,linear:sum,svd,ties:sum:0.5,dare_ties:sum:0.5",
        few_merges="cat,ties:sum:0.5",
        moa_merges="",
        temperatures="1,15",
        modules=(1, 7),
        coefficients_every=10,
        batch=64,
        batch_tokens=1024,
    ),
}
