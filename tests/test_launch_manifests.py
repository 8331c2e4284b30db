"""launch/kubernetes/, launch/skypilot.yaml and launch/Dockerfile against their engines' schemas.

Servers drop a field that they don't know without a word, so an unknown field counts as wrong here,
and a typo planted in each file must be found.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.running import ROOT

LAUNCH = ROOT / "launch"
FILES = sorted((LAUNCH / "kubernetes").glob("*.yaml"))
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem} {document['kind']} {document['metadata']['name']}")
    for path in FILES for document in yaml.safe_load_all(path.read_text())
]


def faults(document: dict) -> str:
    """What the schema of the document's kind says against it; empty where it's right."""
    if "." not in document["apiVersion"]:
        return native_faults(document)
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="in the dev extra")
    model = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }[document["kind"]]
    try:
        understood = model.from_dict(copy.deepcopy(document)).to_dict()
    except ValueError as error:  # pydantic's
        return str(error)
    return "; ".join(unknown(document, understood))


def native_faults(document: dict) -> str:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="in the dev extra")
    try:
        kubernetes_validate.validate(document, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return ""


def unknown(given, understood, path: str = "") -> list[str]:
    """Paths of `given` that the models left out."""
    if isinstance(given, dict) and isinstance(understood, dict):
        return [fault for key in given for fault in (
            unknown(given[key], understood[key], f"{path}.{key}") if key in understood
            else [f"unknown field {path}.{key}"]
        )]
    if isinstance(given, list) and isinstance(understood, list):
        pairs = enumerate(zip(given, understood, strict=True))
        return [f for i, (a, b) in pairs for f in unknown(a, b, f"{path}[{i}]")]
    return []


def fields(document, path: tuple = ()):
    """Every field of a manifest whose name is the schema's and not the user's."""
    own = {"labels", "nodeSelector", "limits", "requests"}  # keys below are free
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        if isinstance(document, dict):
            yield (*path, key)
        if isinstance(value, dict | list) and key not in own:
            yield from fields(value, (*path, key))


def with_typo(document: dict, path: tuple) -> dict:
    """The document with the last letter of one field's name doubled."""
    broken = copy.deepcopy(document)
    inside = broken
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1] + path[-1][-1]] = inside.pop(path[-1])
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_schema_finds_nothing_wrong(document):
    assert faults(document) == ""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_typo_in_any_field_is_found(document):
    planted = [path for path in fields(document) if path not in (("apiVersion",), ("kind",))]
    assert len(planted) > 6
    missed = [path for path in planted if not faults(with_typo(document, path))]
    assert missed == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_wrong_type_is_found(document):
    broken = copy.deepcopy(document)
    broken["spec"] = [broken["spec"]]
    assert faults(broken)


def read(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def set_and_pod(name: str) -> tuple[dict, dict, dict]:
    """(JobSet spec, Job spec, Pod spec) of a manifest."""
    spec = read(name)[0]["spec"]
    jobs = spec["template"]["spec"] if "template" in spec else spec
    job = jobs["replicatedJobs"][0]["template"]["spec"]
    return jobs, job, job["template"]["spec"]


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_when_a_pod_fails_all_start_again(name):
    jobs, job, pod = set_and_pod(name)
    assert job["backoffLimit"] == 0  # or the job would replace one pod, and the others wait for it
    assert pod["restartPolicy"] == "Never"
    assert jobs["failurePolicy"]["maxRestarts"] == 10
    shutdown = int(re.search(r"shutdown-timeout=(\d+)", (LAUNCH / "torchrun.sh").read_text())[1])
    assert pod["terminationGracePeriodSeconds"] > shutdown


def test_both_manifests_run_the_same_pod():
    pods = [set_and_pod(name)[2] for name in ("jobset.yaml", "trainjob.yaml")]
    for pod in pods:  # JobSet names the nodes itself and gives the flags; Trainer does both
        container = pod["containers"][0]
        container.pop("args", None)
        container["env"] = [e for e in container["env"] if not e["name"].startswith("PET_")]
    assert pods[0] == pods[1]


def test_the_jobset_names_its_own_first_pod():
    jobset = read("jobset.yaml")[0]
    name, job = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]
    container = set_and_pod("jobset.yaml")[2]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["PET_MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    nodes = job["template"]["spec"]
    assert int(env["PET_NNODES"]) == nodes["completions"] == nodes["parallelism"]


def test_every_claim_exists():
    claims = {d["metadata"]["name"] for d in read("data.yaml") if "Claim" in d["kind"]}
    for name in ("jobset.yaml", "trainjob.yaml"):
        volumes = set_and_pod(name)[2]["volumes"]
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "emptyDir" not in v}
        assert used == claims


# SkyPilot 0.14's task keys (docs.skypilot.co, "SkyPilot YAML"), as far as they could be meant here.
SKYPILOT_KEYS = {
    "": {"name", "envs", "secrets", "num_nodes", "resources", "workdir", "file_mounts", "setup",
         "run", "config", "volumes"},
    "resources": {"accelerators", "use_spot", "job_recovery", "disk_size", "infra", "cpus",
                  "memory", "image_id", "any_of", "ordered", "autostop", "network_tier"},
    "job_recovery": {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"},
    "storage": {"name", "source", "store", "mode", "persistent"},
}


def skypilot_faults(task: dict) -> set[str]:
    """Keys that no part of a task has."""
    resources = task.get("resources", {})
    parts = [("", task), ("resources", resources)]
    parts += [("job_recovery", resources.get("job_recovery", {}))]
    parts += [("storage", mount) for mount in task.get("file_mounts", {}).values()]
    return {key for name, part in parts for key in part.keys() - SKYPILOT_KEYS[name]}


def test_skypilot_keys():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert skypilot_faults(task) == set()
    assert task["resources"]["use_spot"] is True
    assert skypilot_faults(with_typo(task, ("num_nodes",))) == {"num_nodess"}
    assert skypilot_faults(with_typo(task, ("resources", "use_spot"))) == {"use_spott"}
    assert skypilot_faults(with_typo(task, ("file_mounts", "/runs", "mode"))) == {"modee"}


def test_skypilot_hands_arguments_on_unchanged(tmp_path):
    """ARGS is one string: quotes group its words, and nothing else in it means anything."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    shards = tmp_path / "shards" / "fineweb10B"
    shards.mkdir(parents=True)
    (shards / "manifest.json").touch()
    for name, text in {
        "gpt2/bin/activate": "",
        "launch/torchrun.sh": f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "v").touch()  # what the pattern [v1] would become
    done = subprocess.run(
        ["bash", "-c", task["run"].replace("/shards", str(tmp_path / "shards"))],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_NUM_NODES": "1",
             "ARGS": "demo --name [v1] --sample_prompt 'it is; $HOME'"},
        capture_output=True, text=True, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = ["demo", "--name", "[v1]", "--sample_prompt", "it is; $HOME"]
    expected += ["--data.dir", str(shards), "--out_dir", "/runs"]
    assert done.stdout == f"{expected}\n"


def test_skypilot_reads_its_task(tmp_path, monkeypatch):
    """With SkyPilot's own schema, where it is installed (520 MB)."""
    sky = shutil.which("sky", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if sky is None:
        pytest.skip("no sky on PATH: pip install '.[skypilot]', best in an environment of its own")
    python = Path(sky).parent / "python"
    read_task = "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")

    def from_yaml(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([python, "-c", read_task, path], cwd=ROOT,
                              capture_output=True, text=True, timeout=120)

    done = from_yaml(LAUNCH / "skypilot.yaml")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    typo = tmp_path / "typo.yaml"
    typo.write_text((LAUNCH / "skypilot.yaml").read_text().replace("use_spot", "use_spott"))
    done = from_yaml(typo)
    assert done.returncode != 0
    assert "use_spott" in done.stderr


def docker_lines() -> list[str]:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_pinned_and_not_roots():
    lines = docker_lines()
    assert re.fullmatch(r"FROM python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", lines[0])
    assert [li for li in lines[1:] if li.startswith("FROM")] == []
    assert "USER 1000" in lines
    assert lines.index("USER 1000") > max(i for i, li in enumerate(lines) if li.startswith("RUN"))
    assert [li for li in lines if "pip install" in li and "-c constraints.txt" not in li] == []
    assert [li for li in lines if li.startswith(("ENV", "ARG"))] == []  # where secrets leak from
    assert 'ENTRYPOINT ["/gpt2/launch/torchrun.sh"]' in lines


def test_the_image_takes_sources_alone():
    copied = [li.split()[1:-1] for li in docker_lines() if li.startswith("COPY")]
    names = {name for part in copied for name in part}
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in ignore
    assert names == {line[1:] for line in ignore if line.startswith("!")}
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (it's in the dev extra)")
    done = subprocess.run([hadolint, LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
