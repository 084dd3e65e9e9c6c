"""The policy file: what is accepted, and what each mistake is told to the operator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import load_config, parse_config, write_yaml
from specblock.daemon.config_types import parse_bytes, redact_url
from specblock.daemon.config_yaml import parse
from specblock.daemon.errors import ConfigError, ExitCode

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = "target: {model: m}\ndrafter: {path: p}\n"


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f.yaml", overrides)
    assert caught.value.exit_code == ExitCode.CONFIG
    return caught.value.lines


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.target.model == "models/demo-target"
    # The dump of a resolved config is itself a valid config (secrets aside).
    assert parse_config(write_yaml(config), "dump").resolved() == config.resolved()


def test_all_four_configs_are_shipped() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"local", "gpu", "cluster", "demo"}


def _field_paths(model: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, info in type(model).model_fields.items():
        value, path = getattr(model, name), f"{prefix}{info.alias or name}"
        yield path
        if isinstance(value, BaseModel):
            yield from _field_paths(value, f"{path}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from _field_paths(value[0], f"{path}.0.")


def test_every_field_appears_with_a_comment_in_local_yaml() -> None:
    path = CONFIGS / "local.yaml"
    text = path.read_text()
    document = parse(text, "local.yaml")
    written = {".".join(map(str, loc)) for loc in document.keys}
    assert set(_field_paths(load_config(path))) <= written
    lines = text.splitlines()
    for loc, position in document.keys.items():
        if len(loc) == 2:  # a key of a section, or a list's first line
            assert "#" in lines[position.line - 1], f"{loc} has no comment"


def test_every_field_is_described() -> None:
    def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield model
        for info in model.model_fields.values():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from models(info.annotation)

    missing = [
        f"{model.__name__}.{name}"
        for model in models(DaemonConfig)
        for name, info in model.model_fields.items()
        if not info.description and not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel))
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine: {slots: 0}", "f.yaml:3:17: engine.slots: Input should be greater than or equal to 1 (got 0)"),
        ("engine:\n  slotz: 4", "f.yaml:4:3: engine.slotz: unknown key; did you mean slots?"),
        ("engin: {}", "f.yaml:3:1: engin: unknown key; did you mean engine?"),
        ('http: {port: "80"}', "f.yaml:3:14: http.port: Input should be a valid integer (got '80')"),
        ("http: {port: 70000}", "f.yaml:3:14: http.port: Input should be less than or equal to 65535 (got 70000)"),
        (
            "engine:\n  speculation: off",
            "f.yaml:4:16: engine.speculation: Input should be a valid boolean; write true or false (got 'off')",
        ),
        ("engine: {slots: 1.5}", "f.yaml:3:17: engine.slots: Input should be a valid integer (got 1.5)"),
        ("trainer: {device: tpu}", "f.yaml:3:19: trainer.device: "),
        ("windows: {budget_bytes: 3 apples}", "f.yaml:3:25: windows.budget_bytes: not a size in bytes"),
        ("windows: {heldout_fraction: .nan}", "f.yaml:3:29: windows.heldout_fraction: "),
        ("redis: {url: localhost}", "f.yaml:3:14: redis.url: must start with redis://"),
        (
            "redis: {block_s: 2, socket_timeout_s: 3}",
            "f.yaml:3:39: redis.socket_timeout_s: must be more than block_s + 2 = 4 seconds",
        ),
        ("ray: {address: somewhere}", 'f.yaml:3:16: ray.address: must be "local", "auto" or host:port'),
        ("http: {host: 0.0.0.0}", "f.yaml:3:14: http.host: 0.0.0.0 is reachable from the network"),
        ("http: {port: 8265}", "f.yaml:3:14: http.port: 8265 is also ray.dashboard_port"),
        ("engine: {max_output_tokens: 2048}", "f.yaml:3:29: engine.max_output_tokens: must not exceed"),
        ("ray: {engine_gpus: 1}", "f.yaml:3:20: ray.engine_gpus: GPUs are reserved but target.device is cpu"),
        (
            "adaptation:\n  arms:\n    - {name: a, patterns: [x], steps: 1, learning_rate: 2}",
            "f.yaml:5:57: adaptation.arms.0.learning_rate: Input should be less than or equal to 1 (got 2)",
        ),
        (
            "adaptation:\n  arms:\n    - {name: a, patterns: [x], steps: 1, learning_rat: 1}",
            "f.yaml:5:42: adaptation.arms.0.learning_rat: unknown key; did you mean learning_rate?",
        ),
        (
            "adaptation:\n  arms:\n    - {name: a, patterns: ['token_bias.*', x], steps: 1, learning_rate: 1}",
            "f.yaml:5:27: adaptation.arms.0.patterns: token_bias.* is counted, not trained, and whole: give it",
        ),
        (
            "adaptation:\n  arms:\n    - {name: a, patterns: ['token_pairs.counts'], steps: 1}",
            "f.yaml:5:27: adaptation.arms.0.patterns: token_pairs.* is counted, not trained, and whole: write it so",
        ),
        (
            "adaptation: {policy: {gate: {settle_requests: 0}}}",
            "f.yaml:3:47: adaptation.policy.gate.settle_requests: must be at least",
        ),
        (
            "adaptation:\n  policy: {gate: {setle: 1}}",
            "f.yaml:4:26: adaptation.policy.gate.setle: unknown key; this section knows alpha, ",
        ),
        (
            "adaptation: {policy: {gate: {settle_requests: 1.5}}}",
            "f.yaml:3:47: adaptation.policy.gate.settle_requests: must be a whole number (got 1.5)",
        ),
        ("adaptation: {policy: {gate: 1}}", "f.yaml:3:29: adaptation.policy.gate: must be a section with alpha, "),
        ("adaptation: {policy: {arms: []}}", "f.yaml:3:29: adaptation.policy.arms: set adaptation.arms instead"),
        ("engine: 5", "f.yaml:3:9: engine: Input should be a valid dictionary"),
        ("engine: {slots: 1}\nengine: {slots: 2}", "f.yaml:4:1: engine: repeated key, first given at line 3"),
        ("engine: !!python/object:os.x {}", "f.yaml:3:9: engine: the tag tag:yaml.org,2002:python"),
        ("? [a]\n: b", "f.yaml:3:3: : a key must be plain text"),
    ],
)
def test_each_mistake_names_its_place(text: str, line: str) -> None:
    found = problems(BASE + text)
    assert any(problem.startswith(line) for problem in found), found


def test_prompt_lookup_needs_no_path_and_adapts_nothing() -> None:
    for text in ("drafter: {kind: prompt_lookup}", "drafter: {path: null, kind: prompt_lookup}\nadaptation:"):
        config = parse_config(f"target: {{model: m}}\n{text}", "f")
        assert (config.drafter.path, config.drafter.has_weights) == (None, False)
        assert not config.adaptation.enabled, "the default is what is possible"
        assert config.adaptation_off == "the drafter has no weights; nothing to adapt"
        assert parse_config(write_yaml(config), "dump").resolved() == config.resolved()
    named = parse_config(
        "target: {model: m}\ndrafter: {kind: prompt_lookup}\nadaptation: {enabled: false, cooldown_s: 7}", "f"
    )
    assert (named.adaptation.enabled, named.adaptation.cooldown_s) == (False, 7)
    with_weights = parse_config(BASE, "f")
    assert with_weights.adaptation.enabled and with_weights.adaptation_off == ""
    off = parse_config(BASE + "adaptation: {enabled: false}", "f")
    assert off.adaptation_off == "adaptation.enabled is false"


def test_pairs_are_counted_only_where_a_slot_stands_behind_another() -> None:
    arms = "adaptation: {arms: [{name: a, patterns: ['token_pairs.*'], steps: 1}]}"
    assert parse_config(BASE + arms, "f").adaptation.arms[0].arm(1.0, 1).counts
    with pytest.raises(ConfigError, match=r"a counts token pairs, which drafter\.kind eagle3 has no use for"):
        parse_config(f"target: {{model: m}}\ndrafter: {{kind: eagle3, path: p}}\n{arms}", "f")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "drafter:\n  kind: prompt_lookup\n  path: p",
            ["f.yaml:4:9: drafter.path: prompt_lookup has no weights to load; remove this key (got 'p')"],
        ),
        (
            "drafter: {kind: prompt_lookup}\nadaptation:\n  enabled: true",
            [
                "f.yaml:4:12: adaptation.enabled: must be false with drafter.kind prompt_lookup: the drafter has no "
                "weights; nothing to adapt"
            ],
        ),
        # What is wrong elsewhere in the section is reported together with it.
        (
            "drafter: {kind: prompt_lookup, path: p, beam: 0}\nadaptation: {enabled: true}",
            ["f.yaml:2:38: drafter.path: prompt_lookup has", "f.yaml:2:47: drafter.beam: Input should be"],
        ),
        ("drafter: {kind: eagle3}", ["f.yaml:2:1: drafter.path: required, but not given"]),
        ("drafter: {path: null, beam: 0}", ["f.yaml:2:1: drafter.path: required, ", "f.yaml:2:29: drafter.beam: "]),
        ("drafter: {kind: lookup}", ["f.yaml:2:17: drafter.kind: Input should be 'specblock', 'eagle3', 'parallel' "]),
        ("drafter: {path: 5}", ["f.yaml:2:17: drafter.path: Input should be an instance of Path (got 5)"]),
    ],
)
def test_drafter_paths_go_with_weights(text: str, lines: list[str]) -> None:
    found = problems(f"target: {{model: m}}\n{text}")
    assert len(found) == len(lines), found
    for problem, line in zip(found, lines, strict=True):
        assert problem.startswith(line), found


def test_missing_sections_and_keys() -> None:
    assert problems("target: {}")[0] == "f.yaml:1:1: target.model: required, but not given"
    assert "f.yaml:1:1: drafter: required, but not given" in problems("target: {}")


@pytest.mark.parametrize("text", ["", "- a\n- b", "hello"])
def test_a_file_without_sections(text: str) -> None:
    assert problems(text) == ("f.yaml:1:1: the file must hold sections such as target: and drafter:",)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1", "f.yaml:1:6: "),
        ("a: \tb\n\tc: 1", "f.yaml:1:4: "),
        ("a: b: c", "f.yaml:1:5: "),
        ("a: \x07", "f.yaml:1:4: "),
    ],
)
def test_malformed_yaml_is_one_line_with_a_position(text: str, where: str) -> None:
    (line,) = problems(text)
    assert line.startswith(f"{where}not valid YAML: ")
    assert "\n" not in line


def test_an_alias_may_not_contain_itself() -> None:
    assert any("contains itself" in line for line in problems(BASE + "engine: &e {slots: *e}"))


def test_all_problems_at_once_in_file_order() -> None:
    found = problems("target: {modl: x}\ndrafter: {path: p, beam: 0}\nhttp: {port: x}\nhttp: {}\n")
    assert [line.split(": ")[1] for line in found] == [
        "http",  # the repeated key
        "target.model",
        "target.modl",
        "drafter.beam",
        "http.port",
    ]


def test_yaml_1_2_scalars() -> None:
    config = parse_config(
        BASE + "adaptation:\n  arms: [{name: a, patterns: [x], steps: 0x10, learning_rate: 1e-4}]\n"
        "redis: {url: null}\nhttp: {drain_deadline_s: 5}\nwindows: {budget_bytes: 2MiB}\nengine:\n",
        "f.yaml",
    )
    arm = config.adaptation.arms[0]
    assert (arm.learning_rate, arm.steps) == (1e-4, 16)
    assert config.http.drain_deadline_s == 5.0
    assert config.windows.budget_bytes == 2 * 2**20
    assert config.engine.slots == 8, "an empty section means the defaults"
    assert parse("a: [yes, 'true', true, ~, 1_000]", "f").data == {"a": ["yes", "true", True, None, "1_000"]}


def test_the_bandit_gets_what_the_file_says() -> None:
    config = parse_config(
        BASE + "adaptation: {cooldown_s: 7, price_train: 0.5, policy: {gate: {settle_requests: 99}, min_drop: 0.1},"
        " arms: [{name: a, patterns: [x], steps: 3, learning_rate: 1e-4}]}\n"
        "redis: {block_s: 0.5}\ntrainer: {max_positions: 77}\nstate_dir: /s\n",
        "f",
    )
    policy = config.policy_config()
    assert [arm.name for arm in policy.arms] == ["skip", "a"]
    assert (policy.arm("a").cooldown_s, policy.arm("a").steps, policy.arm("a").positions_per_step) == (7, 3, 77)
    assert (policy.cost.price, policy.gate.settle_requests, policy.min_drop) == (0.5, 99, 0.1)
    stream = config.stream_config("redis://h")
    assert (stream.block_max_s, stream.max_entries) == (0.5, 100_000)
    assert config.service_config().directory == "/s/bandit"


def test_overrides() -> None:
    config = parse_config(
        BASE, "f", ["http.port=9000", "state_dir=/tmp/x", "engine.speculation=false", "windows.budget_bytes=2MiB"]
    )
    assert (config.http.port, config.state_dir, config.engine.speculation) == (9000, Path("/tmp/x"), False)
    arms = BASE + "adaptation: {arms: [{name: a, patterns: [x], steps: 1, learning_rate: 1e-4}]}"
    assert parse_config(arms, "f", ["adaptation.arms.0.steps=7"]).adaptation.arms[0].steps == 7


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("http.port", "--set http.port: write it as section.key=value"),
        ("http.port=x", "--set http.port=x: http.port: Input should be a valid integer (got 'x')"),
        ("http.prt=1", "--set http.prt=1: http.prt: unknown key; did you mean port?"),
        ("http.port.x=1", "--set http.port.x=1: http.port.x: nothing there to set"),
        ("http.port=[", "--set http.port=[:1:2: not valid YAML"),
    ],
)
def test_bad_overrides(override: str, line: str) -> None:
    found = problems(BASE + "http: {port: 8000}", override)
    assert any(problem.startswith(line) for problem in found), found


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_the_tree_is_frozen() -> None:
    config = parse_config(BASE, "f")
    with pytest.raises(ValidationError):
        config.engine.slots = 3


def test_secrets_stay_out_of_the_log_and_of_errors() -> None:
    config = parse_config(BASE + "http: {api_key: abcdefgh1}\nredis: {url: 'rediss://u:pw@h:1/0?ssl_keyfile=/k'}", "f")
    assert config.resolved()["http"]["api_key"] == "***"
    assert config.resolved()["redis"]["url"] == "rediss://***@h:1/0?***"
    assert "short" not in "".join(problems(BASE + "http: {api_key: short}"))
    assert "pw" not in "".join(problems(BASE + "redis: {url: 'redi://u:pw@h'}"))
    assert redact_url("unix:///run/redis.sock") == "unix:///run/redis.sock"


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1KiB", 1024), ("1.5 MiB", 1572864), ("2gb", 2 * 10**9)])
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from specblock.daemon.config_loader import load_config;"
        f"load_config(Path({str(CONFIGS / 'local.yaml')!r}));"
        "print([m for m in ('torch', 'ray', 'transformers', 'redis', 'fastapi') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.strip() == "[]"
