# SPDX-License-Identifier: GPL-2.0
"""A small Debian archive, signed and served on a loopback port, and kernel packages to publish in it."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.arch import X86_64, Architecture
from harness.debian import deb
from tests.kernel_files import CONFIG, IMAGES, build_deb, ko


@dataclass
class Server:
    """A Debian archive on a loopback port: counts requests, and can stall in the middle of packages."""

    directory: Path
    gnupg: Path
    requests: list[str] = field(default_factory=list)
    published: int = 0
    stall: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                super().do_GET()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                if self.path.endswith(".deb") and server.stall.is_set():
                    outputfile.write(source.read(100))
                    outputfile.flush()
                    server.stalled.set()
                    while server.stall.is_set():
                        time.sleep(0.02)
                super().copyfile(source, outputfile)

            def log_message(self, *_args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(self.directory)))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/debian"

    @property
    def keyring(self) -> Path:
        return self.directory.parent / "keyring.gpg"

    def stop(self) -> None:
        self.stall.clear()
        self._http.shutdown()
        self._http.server_close()

    def gpg(self, *arguments: str) -> None:
        command = ["gpg", "--homedir", str(self.gnupg), "--batch", "--quiet", "--yes", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def publish(self, suite: str, *packages: Path, valid_until: str = "", sign: bool = True) -> None:
        """Write a suite's signed index."""
        base = self.directory / ("debian-security" if suite.endswith("-security") else "debian")
        pool = base / "pool"
        pool.mkdir(parents=True, exist_ok=True)
        sums = []
        for arch in ("amd64", "arm64"):
            stanzas = []
            for path in packages:
                fields = deb.control(path)
                if fields["Architecture"] != arch:
                    continue
                shutil.copy(path, pool)
                data = path.read_bytes()
                fields |= {"Filename": f"pool/{path.name}", "Size": str(len(data)), "SHA256": _sha256(data)}
                stanzas.append("".join(f"{name}: {value}\n" for name, value in fields.items()))
            index = "\n".join(stanzas).encode()
            directory = base / "dists" / suite / "main" / f"binary-{arch}"
            directory.mkdir(parents=True, exist_ok=True)
            for name, data in (("Packages", index), ("Packages.gz", gzip.compress(index))):
                (directory / name).write_bytes(data)
                sums.append(f" {_sha256(data)} {len(data)} main/binary-{arch}/{name}\n")
        release = base / "dists" / suite / "Release"
        date = "Thu, 01 Jan 2026 00:00:00 UTC"
        text = f"Origin: Test\nSuite: {suite}\nCodename: {suite}\nDate: {date}\nArchitectures: amd64 arm64\n"
        text += "Components: main\n" + (f"Valid-Until: {valid_until}\n" if valid_until else "")
        release.write_text(text + "SHA256:\n" + "".join(sums))
        inrelease = release.with_name("InRelease")
        if sign:
            self.gpg("--clearsign", "--output", str(inrelease), str(release))
            # HTTP dates have whole seconds: each index must look newer than the one before it.
            self.published += 1
            os.utime(inrelease, (time.time() + 2 * self.published,) * 2)
        else:
            inrelease.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kernel_deb(directory: Path, version: str, arch: Architecture = X86_64, flavour: str = "cloud") -> Path:
    """A kernel package of one piece."""
    release = f"{version.partition('-')[0]}-{flavour}-{arch.debian}"
    files: dict[str, bytes | str] = {
        f"boot/vmlinuz-{release}": IMAGES[arch] + version.encode(),
        f"boot/config-{release}": CONFIG,
        f"usr/lib/modules/{release}/kernel/zram.ko": ko(),
    }
    return build_deb(directory, f"linux-image-{release}", files, arch.debian, version=version)


def split_kernel(directory: Path, version: str) -> list[Path]:
    """The packages of a kernel in pieces: image, binary, modules, base."""
    release = f"{version.partition('-')[0]}-cloud-amd64"
    lib = f"usr/lib/modules/{release}"
    parts: dict[str, dict[str, bytes | str]] = {
        "binary": {f"{lib}/vmlinuz": IMAGES[X86_64] + version.encode()},
        "modules": {f"{lib}/kernel/zram.ko": ko()},
        "base": {f"{lib}/config": CONFIG},
    }
    depends = ", ".join(f"linux-{part}-{release} (= {version})" for part in parts)
    pointer = build_deb(directory, f"linux-image-{release}", {"usr/share/doc/x": "x"}, version=version, depends=depends)
    named = [(f"linux-{part}-{release}", files) for part, files in parts.items()]
    return [pointer, *(build_deb(directory, name, files, version=version) for name, files in named)]
