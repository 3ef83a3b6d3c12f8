r"""sbi's own tests, with flowguard's estimators in place of some of sbi's.

Runs test files of a checkout of sbi twice in fresh processes, once as they are and once with what
``build_zuko_maf``, ``build_zuko_nice`` and ``build_zuko_nsf`` build replaced by ``"robust_maf"``,
``"robust_coupling"`` and ``"robust_nsf"``, wherever sbi or its tests name them; and tells which tests
end otherwise. The checkout has to be that of the version installed.

    git clone --branch v0.27.0 --depth 1 https://github.com/sbi-dev/sbi
    pip install pytest-harvest
    python benchmarks/hosts_sbi.py sbi/tests density_estimator_test.py -k zuko
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

FILES = ("density_estimator_test.py", "posterior_nn_test.py", "save_and_load_test.py")
INSTEAD = {
    "zuko_maf": "robust_maf",
    "zuko_nice": "robust_coupling",
    "zuko_nsf": "robust_nsf",
}


def put_ours() -> None:
    r"""Puts our builders where sbi's are, before its tests import them."""
    from sbi.neural_nets import factory, net_builders
    from sbi.neural_nets.net_builders import flow

    for theirs, ours in INSTEAD.items():
        build = _builder(ours)
        build.__name__ = f"build_{theirs}"  # which pytest calls its tests by
        factory.model_builders[theirs] = build
        for module in (factory, flow, net_builders):
            setattr(module, f"build_{theirs}", build)


def _builder(ours: str) -> Any:
    from flowguard.integrations.sbi import posterior_nn

    def build(
        batch_x: Any, batch_y: Any, z_score_x: Any = "independent", z_score_y: Any = "independent",
        hidden_features: Any = 50, num_transforms: int = 5, embedding_net: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        build = posterior_nn(
            ours, z_score_theta=z_score_x, z_score_x=z_score_y, hidden_features=hidden_features,
            num_transforms=num_transforms, embedding_net=embedding_net, **kwargs,
        )  # fmt: skip
        BUILT[ours] += 1
        return build(batch_x, batch_y)

    return build


BUILT: Counter[str] = Counter()


class Recorder:
    r"""The plugin that writes down how each test ends."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            end = report.outcome
            if hasattr(report, "wasxfail"):
                end = "xfailed" if report.skipped else "xpassed"
            self.ends[report.nodeid] = end


def child(output: Path, ours: bool, arguments: list[str]) -> None:
    import pytest

    if ours:
        put_ours()
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--no-header", "--tb=line"]
    pytest.main([*options, *arguments], plugins=[recorder])
    output.write_text(json.dumps({"ends": recorder.ends, "built": BUILT}))


def run(ours: bool, tests: Path, arguments: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ends.json"
        command = [sys.executable, __file__, "--child", str(output), *["--ours"] * ours]
        subprocess.run([*command, "--", *arguments], cwd=tests.parent, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        found = json.loads(output.read_text())
    return found["ends"], found["built"]


def main() -> None:
    if "--child" in sys.argv:
        split = sys.argv.index("--")
        output = Path(sys.argv[sys.argv.index("--child") + 1])
        child(output, "--ours" in sys.argv[:split], sys.argv[split + 1 :])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", type=Path, help="the folder of sbi's tests")
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("-k", default="", help="which tests, as pytest has it")
    parser.add_argument("-m", default="not slow and not gpu", help="which marks")
    options = parser.parse_args()
    tests = options.tests.resolve()
    print("| file | tests | sbi's own | with ours | ours built | end otherwise |")
    print("|---|---|---|---|---|---|")
    for file in options.files:
        arguments = [f"tests/{file}", "-m", options.m, *(["-k", options.k] if options.k else [])]
        (theirs, _), (ours, built) = (run(which, tests, arguments) for which in (False, True))
        other = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        told = ", ".join(f"{n} {end}" for end, n in Counter(theirs.values()).items())
        now = ", ".join(f"{n} {end}" for end, n in Counter(ours.values()).items())
        print(
            f"| {file} | {len(theirs)} | {told} | {now} | {sum(built.values())} | {len(other)} |"
        )
        for name in other:
            print(f"- {name}: {theirs.get(name)}, with ours {ours.get(name)}")


if __name__ == "__main__":
    main()
