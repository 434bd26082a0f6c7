"""Who may ask: Host, Origin, key, and what a log may hold."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from apertus_mlx.errors import ApertusError, NotFoundError, UsageError
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.listen import KEY_VARIABLE, bind, read_access
from apertus_mlx.server.options import ServeOptions
from apertus_mlx.server.security import Access
from tests.server.running import serving

ALL = "0.0.0.0"  # noqa: S104


def status(access: Access, path: str = "/v1/models", **headers: str) -> int:
    """What a request gets; 200 for one that is let through."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        access.check(Headers({"host": "localhost", **given}), path)
    except ApiError as error:
        return error.status
    return 200


def test_hosts() -> None:
    access = Access(hosts=["mac.local"])
    for host, expected in (
        ("localhost", 200), ("localhost:8080", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200),
        ("LOCALHOST", 200), ("mac.local:8080", 200), ("", 403), ("evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("localhost.evil.example:8080", 403), ("10.0.0.5", 403),
        ("localhost:8080:8080", 403), ("localhost:x", 403), ("::1", 403), ("[", 403),
    ):  # fmt: skip
        assert status(access, host=host) == expected, host
    assert status(Access(any_address=True), host="10.0.0.5:8080") == 200
    assert status(Access(any_address=True), host="evil.example") == 403


def test_origins() -> None:
    access = Access(origins=["https://chat.example"])
    for origin, expected in (
        ("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("http://[::1]:1", 200),
        ("https://chat.example", 200), ("null", 403), ("", 403), ("http://evil.example", 403),
        ("https://chat.example.evil.example", 403), ("file://", 403), ("http://[", 403),
        ("http://localhost.evil.example", 403), ("https://chat.example:444", 403),
    ):  # fmt: skip
        assert status(access, origin=origin) == expected, origin


def test_keys() -> None:
    access = Access(key="abc")
    for headers, expected in (
        ({}, 401), ({"authorization": "Bearer abc"}, 200), ({"authorization": "bearer abc"}, 200),
        ({"x_api_key": "abc"}, 200), ({"authorization": "Bearer abcd"}, 401),
        ({"authorization": "abc"}, 401), ({"authorization": "Bearer é"}, 401),
        ({"authorization": "Basic abc"}, 401), ({"x_api_key": ""}, 401),
    ):  # fmt: skip
        assert status(access, **headers) == expected, headers
    assert status(access, "/health") == 200


def test_what_is_open_with_a_key_and_what_browsers_are_told() -> None:
    with serving(access=Access(key="abc")) as server:
        assert server.get("/health").status_code == 200
        for path in ("/health?deep=1", "/v1/models", "/v1/status", "/nowhere"):
            refused = server.get(path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer abc", "origin": "http://localhost:3000"}
        response = server.get("/v1/models", headers=right)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
        asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
        preflight = server.run(server.ask("OPTIONS", "/v1/completions", headers=asked))
        assert preflight.status_code == 204
        foreign = {**asked, "origin": "http://evil.example"}
        refused = server.run(server.ask("OPTIONS", "/v1/completions", headers=foreign))
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


def test_no_text_of_users_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secret = "the secret of a user"
    with serving() as server:
        server.chat(messages=[{"role": "user", "content": secret}], max_tokens=2)
        server.chat(messages=[{"role": "user", "content": secret}], temperature=-1)
        server.post("/v1/completions", {"prompt": secret, "max_tokens": 2, secret: 1})
        server.get("/v1/models/a%0Ab%1B[31m")
    assert "/v1/chat/completions" in caplog.text
    assert secret not in caplog.text and "\x1b" not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_others_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in (ALL, "::", "192.168.0.5", "mac.local"):
        with pytest.raises(UsageError, match="key"):
            read_access(ServeOptions(host=host))
    assert read_access(ServeOptions()).key is None
    file = tmp_path / "key"
    file.write_text(" abc\n")
    assert read_access(ServeOptions(host=ALL, api_key_file=file)).key == "abc"
    monkeypatch.setenv(KEY_VARIABLE, "xyz")
    assert read_access(ServeOptions(host=ALL)).key == "xyz"
    file.write_text("\n")
    for options, kind in (
        (ServeOptions(api_key_file=file), UsageError),
        (ServeOptions(api_key_file=tmp_path / "absent"), NotFoundError),
    ):
        with pytest.raises(kind):
            read_access(options)
    with pytest.raises(UsageError):
        ServeOptions(api_key="a", api_key_file=file)


def test_a_port_that_is_taken() -> None:
    first = bind("127.0.0.1", 0)
    try:
        first.listen()
        for host, port in (("127.0.0.1", first.getsockname()[1]), ("no such name", 0)):
            with pytest.raises(ApertusError) as refused:
                bind(host, port)
            assert refused.value.exit_code == 2
    finally:
        first.close()
