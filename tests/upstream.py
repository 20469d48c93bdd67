"""Run llm-foundry's own tests with this package and without it: `make upstream`.

A test that passes without the package and not with it is an error. Tests that need the Hub, a GPU or several processes
fail or are skipped alike in both.
"""

import collections
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = [
    "tests/test_registry.py",
    "tests/cli/test_registry_cli.py",
    "tests/models/utils/test_param_init_fns.py",
    "tests/models/test_model.py",
    "tests/models/layers",
    "tests/callbacks",
    "tests/optim",
]


def outcomes(checkout: Path, plugin: bool) -> dict[str, str]:
    """Run the tests in a checkout of llm-foundry, and return the outcome of each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        shutil.copy(Path(__file__).with_name("without_plugin.py"), folder)
        hide = [] if plugin else ["-p", "without_plugin"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *hide,
            *TESTS,
        ]
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
        return found


def main(checkout: Path) -> int:
    """Compare the outcomes, print their counts and the tests that this package breaks, and return how many."""
    # The tests are of the installed llm-foundry, not of the code beside them.
    shutil.rmtree(checkout / "llmfoundry", ignore_errors=True)
    without, with_plugin = (outcomes(checkout, plugin) for plugin in (False, True))
    for name, found in (("without", without), ("with", with_plugin)):
        counts = collections.Counter(found.values())
        print(f"{name}: {', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}")
    broken = [test for test, kind in without.items() if kind == "passed" and with_plugin.get(test) != "passed"]
    print("\n".join(f"breaks: {test}" for test in broken) or "no test breaks")
    return len(broken)


if __name__ == "__main__":
    raise SystemExit(min(main(Path(sys.argv[1]).resolve()), 1))
