"""Every pod of launch/kubernetes/ is admitted where Pod Security enforces its level "restricted".

`violations` is the standard itself, as Kubernetes 1.34 publishes and enforces it
(kubernetes.io/docs/concepts/security/pod-security-standards, pod-security-admission/policy):
"restricted" holds all controls of "baseline". A violation of each control is planted in each pod.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.running import ROOT

ABSENT = None  # a field that is not set
NO = (ABSENT, False)
PROFILES = ("RuntimeDefault", "Localhost")

# (control, field, allowed values) of a pod and of each container in it.
EITHER = [
    ("HostProcess", "securityContext.windowsOptions.hostProcess", NO),
    ("AppArmor", "securityContext.appArmorProfile.type", (ABSENT, *PROFILES)),
    ("SELinux", "securityContext.seLinuxOptions.type", (
        ABSENT, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")),
    ("SELinux", "securityContext.seLinuxOptions.user", (ABSENT, "")),
    ("SELinux", "securityContext.seLinuxOptions.role", (ABSENT, "")),
    ("Running as Non-root", "securityContext.runAsNonRoot", (ABSENT, True)),
    ("Seccomp", "securityContext.seccompProfile.type", (ABSENT, *PROFILES)),
]
POD = [
    ("Host Namespaces", "hostNetwork", NO),
    ("Host Namespaces", "hostPID", NO),
    ("Host Namespaces", "hostIPC", NO),
]
CONTAINER = [
    ("Privileged Containers", "securityContext.privileged", NO),
    ("/proc Mount Type", "securityContext.procMount", (ABSENT, "Default")),
    ("Privilege Escalation", "securityContext.allowPrivilegeEscalation", (False,)),
    *[
        ("Host Probes / Lifecycle Hooks", f"{hook}.{handler}.host", (ABSENT, ""))
        for hook in ("livenessProbe", "readinessProbe", "startupProbe",
                     "lifecycle.postStart", "lifecycle.preStop")
        for handler in ("httpGet", "tcpSocket")
    ],
]
# A container may leave these to its pod; one of the two has to set them.
INHERITED = [
    ("Running as Non-root", "securityContext.runAsNonRoot"),
    ("Seccomp", "securityContext.seccompProfile.type"),
]
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
           "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
}
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"  # the annotation before 1.30


def field(node: dict, path: str) -> Any:
    """The value at a path such as "securityContext.privileged", or ABSENT."""
    for key in path.split("."):
        node = (node or {}).get(key)
    return node


def violations(template: dict) -> set[str]:
    """The controls that a pod template breaks, by the standard's names."""
    pod = template["spec"]
    broken = {name for name, path, allowed in POD + EITHER if field(pod, path) not in allowed}
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            broken.add("HostPath Volumes")
        if not VOLUMES & volume.keys():
            broken.add("Volume Types")
    for sysctl in field(pod, "securityContext.sysctls") or []:
        if sysctl["name"] not in SYSCTLS:
            broken.add("Sysctls")
    for key, value in (field(template, "metadata.annotations") or {}).items():
        allowed = value in ("", "runtime/default") or value.startswith("localhost/")
        if key.startswith(APPARMOR) and not allowed:
            broken.add("AppArmor")
    if field(pod, "securityContext.runAsUser") == 0:
        broken.add("Running as Non-root user")
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            broken |= container_violations(container, pod)
    return broken


def container_violations(container: dict, pod: dict) -> set[str]:
    """The same of one of its containers."""
    rules = CONTAINER + EITHER
    broken = {name for name, path, allowed in rules if field(container, path) not in allowed}
    for name, path in INHERITED:
        if field(container, path) is ABSENT and field(pod, path) is ABSENT:
            broken.add(name)
    if field(container, "securityContext.runAsUser") == 0:
        broken.add("Running as Non-root user")
    if "ALL" not in (field(container, "securityContext.capabilities.drop") or []):
        broken.add("Capabilities")
    if set(field(container, "securityContext.capabilities.add") or []) - {"NET_BIND_SERVICE"}:
        broken.add("Capabilities")
    if any(port.get("hostPort") for port in container.get("ports", [])):
        broken.add("Host Ports")
    return broken


def pod_templates(node: Any) -> list[dict]:
    """Every pod template in a manifest, however deep."""
    if isinstance(node, list):
        return [found for value in node for found in pod_templates(value)]
    if not isinstance(node, dict):
        return []
    if "containers" in node.get("spec", {}):
        return [node]
    return pod_templates(list(node.values()))


def templates_of(path: Path) -> list[dict]:
    return pod_templates(list(yaml.safe_load_all(path.read_text())))


FILES = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))
TEMPLATES = [
    pytest.param(template, id=path.stem) for path in FILES for template in templates_of(path)
]


def test_every_manifest_has_its_pod():
    """A checker that finds no pod finds no fault: one template a file, and one word in each."""
    for path in FILES:
        assert path.read_text().count("containers:") == len(templates_of(path)) == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_restricted_level_admits_every_pod(template):
    assert violations(template) == set()


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_pod_holds_a_service_account_token(template):
    """Beyond the standard: a token that nothing needs is one that nothing can leak."""
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    sources = [s for v in pod["volumes"] for s in v.get("projected", {}).get("sources", [])]
    assert [source for source in sources if "serviceAccountToken" in source] == []


CONTEXT = "spec.securityContext"
FIRST = "spec.containers.0"
IN_FIRST = f"{FIRST}.securityContext"
REMOVED = object()
PLANTED = [
    ("HostProcess", f"{CONTEXT}.windowsOptions.hostProcess", True),
    ("HostProcess", f"{IN_FIRST}.windowsOptions.hostProcess", True),
    ("Host Namespaces", "spec.hostNetwork", True),
    ("Host Namespaces", "spec.hostPID", True),
    ("Host Namespaces", "spec.hostIPC", True),
    ("Privileged Containers", f"{IN_FIRST}.privileged", True),
    ("Capabilities", f"{IN_FIRST}.capabilities", REMOVED),
    ("Capabilities", f"{IN_FIRST}.capabilities.drop", ["NET_RAW"]),
    ("Capabilities", f"{IN_FIRST}.capabilities.add", ["SYS_ADMIN"]),
    ("Volume Types", "spec.volumes.0", {"name": "data", "nfs": {"server": "a", "path": "/"}}),
    ("Host Ports", f"{FIRST}.ports", [{"containerPort": 29400, "hostPort": 29400}]),
    ("Host Probes / Lifecycle Hooks", f"{FIRST}.livenessProbe.httpGet.host", "10.0.0.1"),
    ("Host Probes / Lifecycle Hooks", f"{FIRST}.lifecycle.preStop.tcpSocket.host", "10.0.0.1"),
    ("AppArmor", f"{CONTEXT}.appArmorProfile.type", "Unconfined"),
    ("AppArmor", "metadata.annotations", {f"{APPARMOR}node": "unconfined"}),
    ("SELinux", f"{CONTEXT}.seLinuxOptions.type", "spc_t"),
    ("SELinux", f"{IN_FIRST}.seLinuxOptions.user", "system_u"),
    ("SELinux", f"{IN_FIRST}.seLinuxOptions.role", "system_r"),
    ("/proc Mount Type", f"{IN_FIRST}.procMount", "Unmasked"),
    ("Seccomp", f"{CONTEXT}.seccompProfile", REMOVED),
    ("Seccomp", f"{CONTEXT}.seccompProfile.type", "Unconfined"),
    ("Seccomp", f"{IN_FIRST}.seccompProfile.type", "Unconfined"),
    ("Sysctls", f"{CONTEXT}.sysctls", [{"name": "kernel.msgmax", "value": "65536"}]),
    ("Privilege Escalation", f"{IN_FIRST}.allowPrivilegeEscalation", True),
    ("Privilege Escalation", f"{IN_FIRST}.allowPrivilegeEscalation", REMOVED),
    ("Running as Non-root", f"{CONTEXT}.runAsNonRoot", REMOVED),
    ("Running as Non-root", f"{CONTEXT}.runAsNonRoot", False),
    ("Running as Non-root", f"{IN_FIRST}.runAsNonRoot", False),
    ("Running as Non-root user", f"{CONTEXT}.runAsUser", 0),
    ("Running as Non-root user", f"{IN_FIRST}.runAsUser", 0),
]


def planted(template: dict, path: str, value: Any) -> dict:
    """The template with one field set or removed."""
    changed = copy.deepcopy(template)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inside = changed
    for key in parents:
        inside = inside.setdefault(key, {}) if isinstance(inside, dict) else inside[key]
    if value is REMOVED:
        del inside[last]
    else:
        inside[last] = value
    return changed


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("control", "path", "value"), PLANTED)
def test_a_planted_violation_is_found(template, control, path, value):
    assert violations(planted(template, path, value)) == {control}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_path_of_the_host_breaks_two_controls(template):
    volume = {"name": "data", "hostPath": {"path": "/"}}
    found = violations(planted(template, "spec.volumes.0", volume))
    assert found == {"HostPath Volumes", "Volume Types"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["initContainers", "ephemeralContainers"])
def test_other_containers_are_looked_at_too(template, kind):
    """Bare, they inherit the pod's user and profile, and no more."""
    found = violations(planted(template, f"spec.{kind}", [{"name": "helper"}]))
    assert found == {"Privilege Escalation", "Capabilities"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_standard_allows_is_not_a_violation(template):
    for path, value in [
        (f"{IN_FIRST}.capabilities.add", ["NET_BIND_SERVICE"]),
        (f"{CONTEXT}.seccompProfile.type", "Localhost"),
        (f"{CONTEXT}.sysctls", [{"name": "net.ipv4.tcp_keepalive_time", "value": "60"}]),
        (f"{FIRST}.livenessProbe.httpGet", {"port": 8080}),
        ("metadata.annotations", {f"{APPARMOR}node": "localhost/strict"}),
    ]:
        assert violations(planted(template, path, value)) == set(), path
