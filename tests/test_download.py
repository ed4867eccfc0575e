"""scripts/download_data.sh and scripts/fetch.sh with a server in this process, well-behaved and not."""
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from conftest import ROOT

CLIENTS = "curl", "wget"
SETS = "Set5", "Set14", "B100", "Urban100"
BODY = np.random.RandomState(0).bytes(300_000)
HALF = len(BODY) // 2


class Handler(BaseHTTPRequestHandler):
    """Serves `server.body` at any address; the server's other attributes say how it misbehaves."""

    def do_GET(self):
        server = self.server
        requested = self.headers.get("Range")
        server.requests.append(requested)
        status = server.statuses.pop(0) if server.statuses else 200
        if status != 200:
            return self.send_error(status)
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and not server.ignores_range else 0
        total = len(server.body)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(server.body[start:start + server.drops.pop(0) if server.drops else total])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.ignores_range, server.drops, server.statuses, server.requests = BODY, False, [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """{client: a folder for PATH with it, other programs, and a `sleep` that does not wait}; () is no client."""
    used = ("bash", "bzip2", "dirname", "find", "grep", "gzip", "head", "mkdir", "mv", "rm", "sed", "tail", "tar", "tr",
            "wc", "xz")

    def make(clients):
        folder = tmp_path_factory.mktemp("bin")
        for program in [*used, *clients]:
            if shutil.which(program):
                (folder / program).symlink_to(shutil.which(program))
        (folder / "python3").symlink_to(os.path.realpath(sys.executable))
        (folder / "sleep").write_text("#!/bin/sh\n")
        (folder / "sleep").chmod(0o755)
        return str(folder)
    return {(): make(()), **{client: make([client]) for client in CLIENTS}}


@pytest.fixture
def script(programs, tmp_path):
    """script(name, *arguments, client="curl", **environment) -> the process, with its stdout and stderr."""
    def run(name, *arguments, client="curl", cwd=tmp_path, **environment):
        if client and not shutil.which(client):
            pytest.skip(f"no {client} here")
        env = {"PATH": programs[client], "HOME": str(tmp_path), "no_proxy": "127.0.0.1", **environment}
        return subprocess.run([shutil.which("bash"), str(ROOT / "scripts" / name), *map(str, arguments)], env=env, cwd=cwd,
                              capture_output=True, text=True, timeout=60, check=False)
    return run


@pytest.fixture
def fetch(script, server, tmp_path):
    def run(client="curl", url=None):
        return script("fetch.sh", url or server.url, tmp_path / "a.part", "X_URL", client=client)
    return run


def assert_error(ran, *words):
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), ran
    for word in words:
        assert word in lines[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- fetch.sh

@pytest.mark.parametrize("client", CLIENTS)
def test_a_broken_connection_is_continued_as_long_as_bytes_arrive(server, fetch, tmp_path, client):
    server.drops = [50_000] * 5
    ran = fetch(client)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert (tmp_path / "a.part").read_bytes() == BODY
    assert server.requests == [None, *(f"bytes={start}-" for start in range(50_000, 300_000, 50_000))]


@pytest.mark.parametrize("client", CLIENTS)
def test_an_interrupted_download_is_continued(server, fetch, tmp_path, client):
    (tmp_path / "a.part").write_bytes(BODY[:HALF])
    for requests in [f"bytes={HALF}-"], [f"bytes={HALF}-", f"bytes={len(BODY)}-"]:  # the second time, it is complete
        assert fetch(client).returncode == 0 and server.requests == requests
        assert (tmp_path / "a.part").read_bytes() == BODY


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_cannot_continue_sends_everything(server, fetch, tmp_path, client):
    (tmp_path / "a.part").write_bytes(BODY[:HALF])
    server.ignores_range = True
    assert fetch(client).returncode == 0 and (tmp_path / "a.part").read_bytes() == BODY


@pytest.mark.parametrize("client", CLIENTS)
def test_errors_of_the_server(server, fetch, tmp_path, client):
    (tmp_path / "a.part").write_bytes(BODY[:HALF])
    server.statuses = [404]
    assert_error(fetch(client), "404", server.url, "X_URL")
    assert len(server.requests) == 1
    server.statuses = [503, 503]
    assert fetch(client).returncode == 0
    (tmp_path / "a.part").unlink()
    server.statuses = [503] * 9
    assert_error(fetch(client), "503", "run again")
    assert len(server.requests) == 1 + 3 + 4


@pytest.mark.parametrize("client", CLIENTS)
def test_no_connection(fetch, client):
    assert_error(fetch(client, "http://127.0.0.1:9/a"), "http://127.0.0.1:9/a", "onnect", "X_URL")
    assert_error(fetch(client, "http://a.invalid/a"), "esolve host", "X_URL")


def test_neither_curl_nor_wget(fetch):
    assert_error(fetch(()), "install curl")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/a", "a.bin", "https://", "http://host/a b", "-o/x", ""])
def test_addresses(script, tmp_path, url):
    assert_error(script("fetch.sh", url, tmp_path / "a.part", "X_URL"), "X_URL", "is not an address")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_disk_that_is_full(server, fetch, tmp_path, client):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "a.part").symlink_to("/dev/full")
    assert_error(fetch(client), f"{tmp_path}/a.part: cannot write", "make space")
    assert len(server.requests) == 1


# ---- download_data.sh

def benchmark(lack=()):
    """{member: bytes} of a small benchmark archive, two images a set."""
    names = [f"benchmark/{name}/{kind}/{image}.png" for name in SETS for kind in ("HR", "LR_bicubic/X2", "LR_bicubic/X4")
             for image in ("a", "b")]
    return {name: name.encode() * 50 for name in names if name not in lack}


def tar(members, mode="w:"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


KINDS = {"tar": tar, "tar.gz": lambda members: tar(members, "w:gz"), "tar.xz": lambda members: tar(members, "w:xz"),
         "tar.bz2": lambda members: tar(members, "w:bz2"), "zip": zipped}


@pytest.fixture
def get(script, server, tmp_path):
    """get() runs download_data.sh for the benchmark images into tmp_path/data."""
    (tmp_path / "data").mkdir()

    def run(*arguments, **environment):
        return script("download_data.sh", "benchmark", "--dir_data", tmp_path / "data", *arguments,
                      **{"BENCHMARK_URL": server.url, **environment})
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_data_are_downloaded_once(get, server, tmp_path, kind):
    server.body = KINDS[kind](benchmark())
    ran = get()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {name: (tmp_path / "data" / name).read_bytes() for name in files(tmp_path / "data")} == benchmark()
    assert os.listdir(tmp_path / "data") == ["benchmark"]
    ran = get()
    assert (ran.returncode, ran.stdout) == (0, f"benchmark: complete in {tmp_path}/data/benchmark\n")
    assert len(server.requests) == 1


def test_div2k_into_a_relative_folder_with_its_archive_kept(script, server, tmp_path):
    members = {"DIV2K/DIV2K_train_HR/0001.png": b"a", "DIV2K/DIV2K_train_LR_bicubic/X2/0001x2.png": b"b"}
    server.body = tar(members)
    ran = script("download_data.sh", "DIV2K", "--keep", "--dir_data", "a b;c:d", DIV2K_URL=server.url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert files(tmp_path / "a b;c:d") == ["DIV2K.tar", *sorted(members)]


def test_an_interrupted_call_is_continued(get, server, tmp_path):
    server.body = tar(benchmark())
    server.drops = [1000]
    server.statuses = [200, 404]
    assert_error(get(), "404")
    assert files(tmp_path) == ["data/benchmark.tar.part"] and get().returncode == 0
    assert server.requests == [None, "bytes=1000-", "bytes=1000-"]
    (tmp_path / "data" / ".benchmark.unpacking").mkdir()  # as after a kill while images were put in place
    shutil.rmtree(tmp_path / "data" / "benchmark" / "B100")
    assert get().returncode == 0 and files(tmp_path / "data") == sorted(benchmark())


@pytest.mark.parametrize("ending, kind", [("tar.xz", "tar.xz"), ("tar", "tar.xz"), ("tar", "zip"), ("tgz", "tar.gz")])
def test_an_archive_put_there_by_hand_is_used_and_kept(get, tmp_path, ending, kind):
    (tmp_path / "data" / f"benchmark.{ending}").write_bytes(KINDS[kind](benchmark()))
    ran = get(client=())
    assert (ran.returncode, ran.stderr) == (0, "")
    assert files(tmp_path / "data") == sorted([f"benchmark.{ending}", *benchmark()])


def member(kind, target="/etc/hostname"):
    info = tarfile.TarInfo("benchmark/link")
    info.type, info.linkname = kind, target
    return info


SOUND = tar(benchmark())
BAD = {
    "empty": b"", "page": b"<html>Please log in</html>" * 100, "zeros": bytes(10_240), "half": SOUND[:len(SOUND) // 2],
    "header": SOUND.replace(b"benchmark/Set14/HR/a.png\0", b"benchmark/Set14/HR/a.gif\0"),
    **{f"half of a {kind}": KINDS[kind](benchmark())[:-200] for kind in ("tar.gz", "tar.xz", "tar.bz2", "zip")},
    "zip": zipped(benchmark()).replace(b"PK\3\4", b"PK\3\5", 1),
    "above": tar({**benchmark(), "../out.txt": b"bad"}), "above, later": tar({**benchmark(), "a/../../out.txt": b"bad"}),
    "absolute": tar({**benchmark(), "/tmp/out.txt": b"bad"}), "folder above": tar({**benchmark(), "..": b""}),
    **{name: tar({member(kind): b"", **benchmark()}) for name, kind in (
        ("symbolic link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE),
        ("device", tarfile.CHRTYPE))},
    "another": tar({"DIV2K/DIV2K_train_HR/0001.png": b"a"}),
    "no images": tar(benchmark(["benchmark/Set14/HR/a.png", "benchmark/Set14/HR/b.png"])),
    "other numbers": tar(benchmark(["benchmark/B100/HR/a.png"])),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_cannot_be_unpacked_is_named_and_left(get, tmp_path, content):
    archive = tmp_path / "data" / "benchmark.tar"
    archive.write_bytes(content)
    assert_error(get(), f"{archive}: not unpacked")
    assert files(tmp_path) == ["data/benchmark.tar"] and archive.read_bytes() == content
    assert os.listdir(tmp_path / "data") == ["benchmark.tar"]


def test_a_download_that_cannot_be_unpacked_does_not_get_its_name(get, server, tmp_path):
    server.body = BAD["page"]
    assert_error(get("--keep"), f"{tmp_path}/data/benchmark.tar.part: not unpacked", "delete it")
    assert os.listdir(tmp_path / "data") == ["benchmark.tar.part"]


def test_reasons(get, tmp_path):
    for content, words in ((BAD["no images"], "no PNG images in benchmark/Set14/HR"), (BAD["above"], "outside"),
                           (BAD["other numbers"], "benchmark/B100/LR_bicubic/X2 holds 2 PNG images, benchmark/B100/HR 1"),
                           (BAD["symbolic link"], "benchmark/link -> /etc/hostname"), (BAD["page"], "tar archive")):
        (tmp_path / "data" / "benchmark.tar").write_bytes(content)
        assert_error(get(), words)


def test_a_zip_cannot_leave_its_folder(get, server, tmp_path):
    server.body = zipped({**benchmark(), "../../out.txt": b"bad", "/out.txt": b"bad"})
    assert get().returncode == 0 and files(tmp_path) == sorted(f"data/{name}" for name in benchmark())


def test_missing_sets_are_added_and_the_users_files_stay(get, server, tmp_path):
    server.body = tar(benchmark())
    own = {"benchmark/Mine/HR/m.png": b"m", "benchmark/Set5/HR/mine.png": b"five"}
    for name, content in own.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(content)
    assert get().returncode == 0 and get().returncode == 0
    expected = {name: content for name, content in benchmark().items() if "Set5" not in name} | own
    assert {name: (tmp_path / "data" / name).read_bytes() for name in files(tmp_path / "data")} == expected
    (tmp_path / "data" / "benchmark" / "B100" / "LR_bicubic" / "X4" / "a.png").unlink()
    assert_error(get(), f"{tmp_path}/data/benchmark/B100/LR_bicubic/X4 holds 1 PNG images", "move")
    assert len(server.requests) == 1


@pytest.mark.parametrize("arguments, words", [
    (["Set5"], "there is no dataset or flag Set5: there are DIV2K, benchmark"), (["--dir"], "--dir_data"),
    (["--dir_data"], "no folder given"), (["--dir_data", "file/data"], "file/data"), (["$(touch x)"], "$(touch x)")])
def test_mistakes(script, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    assert_error(script("download_data.sh", *arguments), words)
    assert files(tmp_path) == ["file"]


def test_a_page_is_printed_for_a_set_without_an_address(script, server, tmp_path):
    names = ("GoPro", "Rain13K", "SIDD", "RealSR")
    ran = script("download_data.sh", *names, "--dir_data", tmp_path / "data")
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2 and len(lines) == len(names) and not (tmp_path / "data").exists()
    assert all(f"error: {name}: cannot be" in line and "--pair_dirs" in line for name, line in zip(names, lines))
    server.body = tar(benchmark())
    ran = script("download_data.sh", "GoPro", "benchmark", "--dir_data", tmp_path / "data", BENCHMARK_URL=server.url)
    assert ran.returncode == 2 and files(tmp_path / "data") == sorted(benchmark())


def test_a_file_in_the_way_and_a_home_folder(script, server, tmp_path):
    server.body = tar(benchmark())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "benchmark").touch()
    ran = script("download_data.sh", "benchmark", "--dir_data=~/data", BENCHMARK_URL=server.url)
    assert_error(ran, f"{tmp_path}/data/benchmark: cannot make")
    (tmp_path / "data" / "benchmark").unlink()
    assert script("download_data.sh", "benchmark", "--dir_data", "~/data", BENCHMARK_URL=server.url).returncode == 0
    assert files(tmp_path / "data") == sorted(benchmark())


def test_help(script):
    ran = script("download_data.sh", "--help")
    assert ran.stdout.startswith("usage: bash scripts/download_data.sh [DIV2K]") and "BENCHMARK_URL" in ran.stdout
    assert (ran.returncode, ran.stderr) == (0, "") and "set -e" not in ran.stdout
