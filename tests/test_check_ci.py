"""The oracle in other people's CI: its workflow, JUnit's XML, the schema, and NumPy alone."""

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

import lvxattn.check
from lvxattn.check import Report, Row, case_of, check
from lvxattn.check.check_report import SCHEMA
from lvxattn.check.judge import Verdict
from tests.launch import environment, launch
from tests.oracle import right

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
VALIDATOR = jsonschema.Draft202012Validator(
    json.loads((Path(lvxattn.check.__file__).parent / "report.schema.json").read_text())
)
WRONG = """
import numpy as np

def attention(q, k, v, *, scale, mask):
    if mask is not None:
        raise NotImplementedError("no masks")
    s = scale * q @ np.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2)
    p = np.exp(s)  # of scores of 600, too
    return p @ np.repeat(v, q.shape[1] // k.shape[1], axis=1) / p.sum(axis=-1, keepdims=True)
"""


def steps() -> dict[str, str]:
    """Return the commands of the workflow, by name."""
    workflow = yaml.safe_load((DOCS / "ci" / "check-kernel.yml").read_text())
    assert workflow["env"] == {"KERNEL": "mine:attention", "FRAMEWORK": "numpy"}
    found = workflow["jobs"]["check"]["steps"]
    return {step["name"]: step["run"] for step in found if "run" in step}


def run_step(name: str, folder: Path, *more: str) -> Any:
    text = steps()[name].replace("$KERNEL", "mine:attention").replace("$FRAMEWORK", "numpy")
    python, *words = shlex.split(text)
    assert python == "python"
    (folder / "mine.py").write_text(WRONG)
    return subprocess.run(
        [sys.executable, *words, *more],
        cwd=folder,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_workflow_writes_junit_xml_of_each_case(tmp_path: Path) -> None:
    few = "scores-600 or gaussian or random-mask"
    ended = run_step("check", tmp_path, "-k", few)
    assert ended.returncode == 1, ended.stderr
    found = {
        case.attrib["name"]: {child.tag for child in case}
        for case in ET.parse(tmp_path / "attention.xml").iter("testcase")
    }
    assert found["test_attention[gaussian-float64]"] == set()
    assert found["test_attention[scores-600-float32]"] == {"failure"}
    assert found["test_attention[random-mask-float64]"] == {"skipped"}


def test_the_workflow_writes_a_report_that_follows_the_schema(tmp_path: Path) -> None:
    ended = run_step("report", tmp_path, "--dtypes", "float64")
    assert ended.returncode == 1, ended.stderr
    report = json.loads((tmp_path / "attention.json").read_text())
    VALIDATOR.validate(report)
    assert report["passed"] is False
    assert {row["status"] for row in report["rows"]} == {"ok", "wrong", "unsupported"}


def test_the_workflow_installs_an_extra_that_exists() -> None:
    assert '"lvxattn[check]"' in steps()["install"]
    assert '\ncheck = ["numpy>=2"]\n' in (ROOT / "pyproject.toml").read_text()


# The schema.


def nan_report() -> Report:
    return check(
        lambda q, k, v, *, scale, mask: np.full_like(q, np.nan),
        dtypes=("float64",),
        cases=[case_of("gaussian")],
    )


def test_reports_of_all_kinds_follow_the_schema() -> None:
    for report in (check(right, cases=[case_of("one-key")]), nan_report()):
        found = json.loads(report.as_json())
        VALIDATOR.validate(found)
        assert found["schema"] == SCHEMA


def test_the_schema_names_every_field() -> None:
    schema = VALIDATOR.schema
    row, verdict = (schema["$defs"][name]["properties"] for name in ("row", "verdict"))
    assert set(row) == {field.name for field in fields(Row)}
    assert set(verdict) == {field.name for field in fields(Verdict)} | {"passed"}
    own = {field.name for field in fields(Report)}
    assert set(schema["properties"]) == own | {"schema", "passed", "worst_ratio"}
    assert schema["properties"]["schema"]["const"] == SCHEMA


@pytest.mark.parametrize("change", [{"schema": 2}, {"passed": "yes"}, {"rows": [{"case": "a"}]}])
def test_the_schema_refuses_what_is_no_report(change: dict[str, Any]) -> None:
    found = json.loads(nan_report().as_json())
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(found | change)


# NumPy alone.

ALONE = """
from lvxattn.check import check
from tests.oracle import right

def attention(q, k, v, *, scale, mask):
    return right(q, k, v, scale=scale, mask=mask)

print(check(attention, dtypes=["float64"]).passed)
"""


def test_the_oracle_needs_numpy_alone(tmp_path: Path) -> None:
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (installed / name).exists():
            (tmp_path / name).symlink_to(installed / name)
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "src", ROOT)))
    # -S: without the packages that are installed.
    ended = launch([sys.executable, "-S", "-c", ALONE], timeout=300, env={"PYTHONPATH": path})
    assert ended.out == "True\n", ended.err
