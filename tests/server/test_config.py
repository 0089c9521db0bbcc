"""Where settings come from, and what is refused."""

import os
import re
from pathlib import Path

import pytest

from server.config import Settings, SettingsError, is_loopback, load_settings, parse_size


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_command_line_wins_then_the_environment_then_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "s.toml", "[serve]\nport = 1\nmax_num_seqs = 1\nmax_model_len = 1\n[limits]\nn = 4\n")
    monkeypatch.setenv("LORAMUX_SERVE__PORT", "2")
    monkeypatch.setenv("LORAMUX_SERVE__MAX_NUM_SEQS", "2")
    settings = load_settings({"serve": {"port": 3}}, file)
    assert (settings.serve.port, settings.serve.max_num_seqs, settings.serve.max_model_len) == (3, 2, 1)
    assert settings.limits.n == 4
    assert settings.serve.host == "127.0.0.1"


def test_short_names_of_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", '[serve]\nadmin_key = "file"\napi_key = ["a", "b"]\n')
    assert [key.get_secret_value() for key in load_settings(file=file).serve.api_key] == ["a", "b"]
    monkeypatch.setenv("LORAMUX_ADMIN_KEY", "short")
    monkeypatch.setenv("LORAMUX_API_KEY", "one")
    serve = load_settings(file=file).serve
    assert serve.admin_key is not None
    assert serve.admin_key.get_secret_value() == "short"
    assert [key.get_secret_value() for key in serve.api_key] == ["one"]
    monkeypatch.setenv("LORAMUX_SERVE__API_KEY", '["x", "y"]')
    assert [key.get_secret_value() for key in load_settings().serve.api_key] == ["x", "y"]
    assert "short" not in repr(serve)


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.serve.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"),
    [("auto", None), ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("4096", 4096), (7, 7)],
)
def test_sizes(text: object, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "2XB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"serve": {"prot": 1}}, r"^unknown setting serve\.prot, did you mean serve\.port\?$"),
        ({"port": 1}, r"^unknown setting port, did you mean serve\.port\?$"),
        ({"serve": {"min_score": 1}}, r"did you mean routing\.min_score\?$"),
        ({"server": {}}, r"^unknown setting server, did you mean serve\?$"),
        ({"serve": {"zzz": 1}}, r"^unknown setting serve\.zzz$"),
        ({"serve": {"port": "x"}}, "serve.port"),
        ({"serve": {"port": 70000}}, "serve.port"),
        ({"serve": {"device": "tpu"}}, "serve.device"),
        ({"serve": {"kv_memory": "lots"}}, "serve.kv_memory: expected a size"),
        ({"serve": {"kv_memory": "0"}}, "serve.kv_memory"),
        ({"serve": {"served_name": "auto"}}, "reserved"),
        ({"serve": {"served_name": "auto:x"}}, "served_name"),
        ({"serve": {"host": "0.0.0.0"}}, "--insecure"),
        ({"serve": {"host": "::", "metrics_key": "m"}}, "--insecure"),
        ({"serve": {"shutdown_timeout": float("inf")}}, "serve.shutdown_timeout"),
        ({"serve": {"admin_key": ""}}, "serve.admin_key"),
    ],
)
def test_refused(overrides: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as refused:
        load_settings(overrides)
    assert "\n" not in str(refused.value)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("LORAMUX_PORT_8000_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("LORAMUX_SERVICE_HOST", "10.0.0.1")
    assert load_settings().serve.port == 8000


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LORAMUX_SERVE__PROT", ", did you mean LORAMUX_SERVE__PORT?"),
        ("LORAMUX_PORT", ", did you mean LORAMUX_SERVE__PORT?"),
        ("LORAMUX_SERVE", ""),
        ("LORAMUX_DATA_DIR__X", ", did you mean LORAMUX_DATA_DIR?"),
        ("LORAMUX_ZZZ", ""),
    ],
)
def test_unknown_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value) == f"environment variable {name} is no setting of loramux{meant}"


@pytest.mark.parametrize("text", ["[serve\n", "[serve]\nprot = 1\n", "serve = 3\n"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"s\.toml" if text == "[serve\n" else "serve"):
        load_settings(file=write(tmp_path / "s.toml", text))
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(file=tmp_path / "none.toml")


@pytest.mark.parametrize("serve", [{"api_key": ["k"]}, {"admin_key": "k"}, {"insecure": True}])
def test_other_machines_with_keys_or_on_purpose(serve: dict[str, object]) -> None:
    assert load_settings({"serve": {"host": "0.0.0.0", **serve}}).serve.host == "0.0.0.0"


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5


def test_the_engines_share() -> None:
    serve = {"kv_memory": "1MiB", "max_num_seqs": 3, "dtype": "bfloat16", "gate_slots": 2, "gates_per_slot": 128}
    serve |= {"max_layered_tokens": 77}
    settings = load_settings({"serve": serve})
    config = settings.serve.engine_config(Path("/models/m"), Path("/data"))
    assert (config.model, config.kv_memory, config.max_num_seqs, config.dtype) == ("/models/m", 1 << 20, 3, "bfloat16")
    assert (config.gate_slots, config.gates_per_slot) == (2, 128)
    assert config.max_layered_tokens == 77
    assert config.page_memory is None


def test_several_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    serve = load_settings({"serve": {"engines": 3, "host_memory": "3GiB", "kv_memory": "1GiB"}}).serve
    configs = serve.engine_configs(Path("/models/m"), Path("/data"))
    assert [config.device for config in configs] == ["auto:0", "auto:1", "auto:2"]
    assert {(config.num_threads, config.host_memory, config.kv_memory) for config in configs} == {(4, 2**30, 2**30)}
    (alone,) = load_settings().serve.engine_configs(Path("/models/m"), Path("/data"))
    assert (alone.device, alone.num_threads) == ("auto", None)
    for wrong in (0, 65, "two"):
        with pytest.raises(SettingsError, match=r"^serve\.engines: "):
            load_settings({"serve": {"engines": wrong}})


def test_the_stores_share(tmp_path: Path) -> None:
    config = load_settings().serve.store_config("org/model", tmp_path)
    assert config.database_url == f"sqlite:///{tmp_path}/registry/org--model.sqlite"
    assert (config.blob_url, config.folder) == (f"{tmp_path}/blobs/org--model", tmp_path / "store" / "org--model")
    given = {"database_url": "postgresql://host/name", "blob_url": "s3://bucket/prefix"}
    config = load_settings({"serve": given}).serve.store_config("model", tmp_path)
    assert (config.database_url, config.blob_url) == ("postgresql://host/name", "s3://bucket/prefix")


def test_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", '[sources]\nhttps_hosts = ["a.example"]\nmax_adapter_bytes = "1GiB"\n')
    monkeypatch.setenv("LORAMUX_SOURCES__HUB_TOKEN", "secret")
    settings = load_settings({"serve": {"adapter_root": [tmp_path]}}, file)
    assert settings.sources.https_hosts == ("a.example",)
    assert settings.sources.max_adapter_bytes == 2**30
    assert settings.sources.hub_token is not None
    assert "secret" not in repr(settings)
    assert settings.serve.adapter_root == (tmp_path,)


def test_the_documented_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (block,) = re.findall(r"```\n(\[serve\]\n.*?)```", text, re.DOTALL)
    monkeypatch.setenv("LORAMUX_ADMIN_KEY", "k")
    settings = load_settings(file=write(tmp_path / "s.toml", block))
    assert settings.serve.host == "0.0.0.0"
    assert settings.sources.s3_buckets == ("our-adapters",)


def test_what_clients_read_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without = load_settings().model_dump()
    monkeypatch.setenv("LORAMUX_URL", "http://127.0.0.1:8000")
    assert load_settings().model_dump() == without


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().data_dir == tmp_path / ".local" / "share" / "loramux"
    monkeypatch.setenv("LORAMUX_DATA_DIR", "/data")
    assert load_settings().data_dir == Path("/data")
    assert load_settings({"data_dir": "/other"}).data_dir == Path("/other")
