"""A pod of a rendered Job, run as processes of this machine as a kubelet would run it.

The processes have the pod's environment and mounts, a read-only root file system, the pod's user
without capabilities, and a process namespace of their own. This machine with the checkout at /app
stands for the image.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.hosts import TwoHosts

ROOT = Path(__file__).resolve().parents[2]
# What the Dockerfile sets.
_IMAGE = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "CNSDIFF_CACHE": "/cache",
    "PYTHONUNBUFFERED": "1",
}


def environment(container: dict[str, Any], labels: dict[str, str]) -> dict[str, str]:
    """The variables of a container; a ``$(NAME)`` refers to those that stand before it."""
    found = {"JOB_COMPLETION_INDEX": labels["batch.kubernetes.io/job-completion-index"]}
    for variable in container["env"]:
        if source := variable.get("valueFrom"):
            label = re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"])
            assert label, source
            found[variable["name"]] = labels[label[1]]
        else:
            value = re.sub(
                r"\$\((\w+)\)", lambda match: found.get(match[1], match[0]), variable["value"]
            )
            found[variable["name"]] = value
    return found


def labels(job: str, index: int, **more: str) -> dict[str, str]:
    """The labels that the Job controller adds to those of the template."""
    own = {"job-name": job, "job-completion-index": str(index)}
    return {**{f"batch.kubernetes.io/{key}": value for key, value in own.items()}, **more}


@dataclass
class Mounts:
    """What a pod's volumes hold.

    Attributes:
        configs: of each ConfigMap, name -> file -> text.
        claims: of each PersistentVolumeClaim, name -> folder of this machine.
    """

    configs: dict[str, dict[str, str]]
    claims: dict[str, Path]

    def make(
        self, spec: dict[str, Any], container: dict[str, Any], folder: Path
    ) -> list[tuple[str, str, bool]]:
        """Fill the volumes of a pod; (folder here, path there, read-only) of each mount."""
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        found = []
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if claim := volume.get("persistentVolumeClaim"):
                source = self.claims[claim["claimName"]]
            else:
                source = folder / mount["name"]
                source.mkdir()
                os.chown(source, 0, spec["securityContext"]["fsGroup"])
                source.chmod(0o2775)
                files = self.configs.get(volume.get("configMap", {}).get("name"), {})
                for name, text in files.items():
                    (source / name).write_text(text)
            found.append((str(source), mount["mountPath"], mount.get("readOnly", False)))
        return found


class Pod:
    """A pod that runs on one of two hosts, whose first name must be JOB-INDEX.

    Args:
        spec: the pod's.
        extra: variables besides the rendered ones, such as a thread count for a small machine.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        job: str,
        index: int,
        hosts: TwoHosts,
        folder: Path,
        mounts: Mounts,
        **extra: str,
    ) -> None:
        (container,) = spec["containers"]
        self.environment = environment(container, labels(job, index))
        folder.mkdir()
        made = mounts.make(spec, container, folder)
        words = [*container["command"], *container["args"]]
        if shutil.which("tini") is None:  # which the image has; without it the rest is PID 1
            words = words[words.index("--") + 1 :]
        variables = {**_IMAGE, **self.environment, **extra}
        user = spec["securityContext"]
        script = _script(made, variables, user, container["workingDir"], words)
        space = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*hosts.inside(index), *space], stdout=log, stderr=log, start_new_session=True
            )

    def sigterm(self) -> None:
        """Send SIGTERM to the first process of the container, as the kubelet does."""
        (first,) = psutil.Process(self.process.pid).children()
        first.terminate()

    def ended(self, seconds: float = 240) -> tuple[int, str]:
        return self.process.wait(seconds), self.log.read_text()

    def remove(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _script(
    mounts: list[tuple[str, str, bool]],
    variables: dict[str, str],
    user: dict[str, Any],
    folder: str,
    words: list[str],
) -> str:
    places = " ".join(shlex.quote(f"$root{path}").replace("'", '"') for _, path, _ in mounts)
    binds = [
        f'mount --bind {"-o ro " * read_only}{shlex.quote(source)} "$root{path}"'
        for source, path, read_only in mounts
    ]
    env = " ".join(shlex.quote(f"{name}={value}") for name, value in variables.items())
    ids = f"--reuid {user['runAsUser']} --regid {user['runAsGroup']} --groups {user['fsGroup']}"
    inside = f'cd {folder} && exec "$@"'
    lines = [
        "set -e",
        "room=$(mktemp -d)",
        "mount -t tmpfs tmpfs $room",
        "root=$room/root",
        "mkdir $room/upper $room/work $root",
        "mount -t overlay overlay -o lowerdir=/,upperdir=$room/upper,workdir=$room/work $root",
        f'mkdir -p "$root/app" {places}',
        'chmod o+x "$root/root"',  # where a Python of root's own may live
        f'mount --bind -o ro {shlex.quote(str(ROOT))} "$root/app"',
        'mount --bind /etc/hosts "$root/etc/hosts"',
        'mount --rbind /dev "$root/dev"',
        'mount -t proc proc "$root/proc"',
        'mount -o remount,ro "$root"',
        *binds,
        f'exec chroot "$root" env -i {env} setpriv {ids} --no-new-privs --bounding-set=-all '
        f"--inh-caps=-all sh -c {shlex.quote(inside)} - {shlex.join(words)}",
    ]
    return "\n".join(lines)
