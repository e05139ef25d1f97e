"""A real S3 server on this machine, which can be killed, paused and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.ports import free_ports

KEY, SECRET = "testkey", "a-secret-that-must-not-be-shown"


class S3Server:
    """SeaweedFS in one process, whose directory and ports stay the same over restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self._ports = free_ports(5)
        self._process: subprocess.Popen[bytes] | None = None
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def port(self) -> int:
        return self._ports[3]

    def environment(self, port: int | None = None) -> dict[str, str]:
        """The variables that a client needs; ``port`` is that of a proxy, if there is one."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "CNSDIFF_CACHE": str(self.folder / "cache"),
        }

    def start(self) -> None:
        master, volume, filer, s3, admin = self._ports
        weed, folder = str(Path(sys.executable).parent / "weed"), self.folder
        ports = {"master": master, "volume": volume, "filer": filer, "s3": s3, "admin": admin}
        command = [weed, "mini", f"-dir={folder}", f"-s3.config={folder}/s3.json"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        command += "-ip=127.0.0.1 -ip.bind=127.0.0.1 -admin.ui=false -webdav=false".split()
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def kill(self) -> None:
        """Kill the server if it runs, as a crash would.

        ``stop`` does the same, because the server takes half a minute to end on SIGTERM.
        """
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    stop = kill

    def pause(self) -> None:
        """Stop answering, but keep the connections."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def filesystem(self):
        """A new client; s3fs would otherwise hand out the instance that other tests use."""
        import s3fs

        return s3fs.S3FileSystem(
            key=KEY,
            secret=SECRET,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"connect_timeout": 2, "read_timeout": 5},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def create_bucket(self, name: str, seconds: float = 60) -> str:
        """Wait until the server answers, make the bucket unless it exists, and return its URL."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fs = self.filesystem()
                if not fs.exists(name):
                    fs.mkdir(name)
                return f"s3://{name}"
            except Exception:
                if time.monotonic() > deadline:
                    raise RuntimeError(self.log.read_text()[-2000:]) from None
                time.sleep(0.2)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket, whose endpoint and keys are in the environment."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    environment = pytest.MonkeyPatch()
    for name, value in server.environment().items():
        environment.setenv(name, value)
    try:
        server.start()
        yield server.create_bucket("train-bucket")
    finally:
        environment.undo()
        server.stop()


@pytest.fixture
def new_clients() -> Iterator[Callable[[], None]]:
    """A function that drops the clients of s3fs, which would keep the old keys and endpoint."""
    import s3fs

    yield s3fs.S3FileSystem.clear_instance_cache
    s3fs.S3FileSystem.clear_instance_cache()
