"""How an application for Ray Serve is configured, and what is refused."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve._private.http_util import set_socket_reuse_port
from ray.serve.schema import ServeDeploySchema

from deploy.ray_serve import app
from deploy.ray_serve.__main__ import WRONG_USAGE, free_port, main, read_options, reason
from deploy.ray_serve.settings import RaySettings, read_settings
from server.config import ServeSettings, SettingsError

SHARED = {"model": "m", "database_url": "postgresql://db/loramux", "blob_url": "s3://bucket/adapters"}


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("LORAMUX_"):
            monkeypatch.delenv(name)


def test_arguments_are_those_of_serve_with_ray_and_groups_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text("[serve]\nmax_num_seqs = 5\nkv_memory = '1GiB'\n[limits]\nn = 3\n")
    arguments = {"max_num_seqs": "8", "encoder": "none", "config": str(file), "data_dir": "/data"}
    arguments |= {"http": {"keep_alive": 3}}
    settings, spread = read_settings(SHARED | arguments | {"ray_front_ends": "2", "ray_max_engines": 4})
    assert (settings.serve.max_num_seqs, settings.serve.kv_memory, settings.limits.n) == (8, 1 << 30, 3)
    assert (settings.routing.encoder, settings.data_dir, settings.http.keep_alive) == ("none", Path("/data"), 3)
    assert spread == RaySettings(front_ends=2, max_engines=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no model is given"),
        ({"database_url": None}, "database_url: .*expected postgresql://"),
        ({"database_url": "sqlite:////data/registry.sqlite"}, "SQLite is a file of one machine"),
        ({"blob_url": None}, "blob_url: .*expected s3://"),
        ({"blob_url": "/data/blobs"}, "a folder is on one machine"),
        ({"frontends": 2}, "^frontends: each replica is one"),
        ({"engines": 2}, "^engines: each replica has one"),
        ({"ray_max_engines": 0}, "^ray_max_engines: "),
        ({"ray_min_engines": 3, "ray_max_engines": 2}, "^ray_min_engines is 3, expected at most ray_max_engines, 2$"),
        ({"ray_engines": 3}, "^ray_engines: "),
        ({"max_foo": 3}, "unknown setting serve.max_foo"),
        ({"config": "/nowhere.toml"}, "there is no such file"),
    ],
)
def test_what_cannot_be_served_by_many_machines_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    arguments = {name: value for name, value in (SHARED | changes).items() if value is not None}
    with pytest.raises(SettingsError, match=message):
        read_settings(arguments)


def test_an_application_needs_a_key_or_a_word_that_it_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="no key is set: give LORAMUX_ADMIN_KEY"):
        app(SHARED)
    engines, front_ends = "engines", "front-ends"
    assert app(SHARED | {"insecure": "true"})._bound_deployment.name == front_ends
    monkeypatch.setenv("LORAMUX_ADMIN_KEY", "secret")
    built = app(SHARED | {"ray_max_engines": 3, "max_num_seqs": 5, "device": "cuda"})._bound_deployment
    (bound,) = built.init_args
    engine = bound._bound_deployment
    assert (built.name, engine.name) == (front_ends, engines)
    assert engine.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0}
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 5)


def test_the_file_in_the_documentation_is_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    (block,) = [part for part in text.split("```") if "import_path: deploy.ray_serve:app" in part]
    (application,) = ServeDeploySchema.parse_obj(yaml.safe_load(block)).applications
    arguments = {name: value for name, value in application.args.items() if name != "config"}
    settings, spread = read_settings(arguments)
    assert (settings.serve.device, spread.front_ends, spread.max_engines) == ("cuda", 2, 8)


def test_what_a_replica_died_of_is_told_in_one_line() -> None:
    text = 'Traceback (most recent call last):\n  File "x.py", line 3\nValueError: inner\n\n'
    text += "adapters_store.opening.StoreOpenError: the registry is unavailable:  its database\n\n  more"
    deployments = {"front-ends": SimpleNamespace(message=""), "engines": SimpleNamespace(message=text)}
    status = SimpleNamespace(applications={"loramux": SimpleNamespace(deployments=deployments)})
    assert reason(status, "failed") == "the registry is unavailable: its database"
    del deployments["engines"]
    assert reason(status, "Deploying\nfailed") == "Deploying failed"
    assert reason(SimpleNamespace(applications={}), "failed") == "failed"


def test_options_of_the_command_line() -> None:
    options = ["--model", "m", "--max-num-seqs=8", "--insecure", "--api-key", "a", "--api-key", "b"]
    expected = {"model": "m", "max_num_seqs": "8", "insecure": "true", "api_key": ["a", "b"]}
    assert read_options(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model", "m"], "model: expected --NAME VALUE"),
        (["--model", "m"], "SQLite is a file of one machine"),
        (["--model", "m", "--host", "0.0.0.0"], "no key is set"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == WRONG_USAGE
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("loramux: ")
    assert captured.err.count("\n") == 1


def test_a_free_port_is_serves_and_nobody_elses() -> None:
    with free_port(ServeSettings(port=0)) as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as serves:
            assert set_socket_reuse_port(serves)
            serves.bind(("127.0.0.1", port))
            serves.listen()
            socket.create_connection(("127.0.0.1", port)).close()
    with free_port(ServeSettings(port=8123)) as port:
        assert port == 8123
