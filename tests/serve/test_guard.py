"""Who may ask, and what a request may look like, before a route sees it."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from edgelm import ConfigError
from edgelm.serve.errors import ApiError
from edgelm.serve.guard import check_depth
from edgelm.serve.settings import ServeSettings, read_keys
from tests.serve.conftest import app_client

KEYS = ("first-key-0123456789", "second-key-0123456789")
PROMPT = {"prompt": "Hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def keyed() -> Iterator[TestClient]:
    settings = ServeSettings(keys=KEYS, allowed_hosts=("api.example.org",), cors_origins=("https://example.org",))
    with app_client(settings) as client:
        yield client


def test_every_key_opens(keyed: TestClient) -> None:
    for key in KEYS:
        assert keyed.post("/v1/completions", json=PROMPT, headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/openapi.json", "/nothing"])
@pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x"])
def test_nothing_opens_without_a_key(keyed: TestClient, path: str, header: str | None) -> None:
    answer = keyed.get(path, headers={} if header is None else {"authorization": header})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not any(key in answer.text for key in KEYS)


def test_health_needs_no_key_and_tells_nothing(keyed: TestClient) -> None:
    assert keyed.get("/health").json() == {"status": "ok"}


def test_prompts_of_other_keys_are_not_reused(keyed: TestClient) -> None:
    body = {"prompt": "a secret prompt that is long enough", "max_tokens": 1}

    def cached(key: str) -> int:
        answer = keyed.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[0]) > 0


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80", "192.168.1.5"])
def test_hosts_of_this_machine(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.nip.io"]
)
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/health", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


def test_a_named_host(keyed: TestClient) -> None:
    assert keyed.get("/health", headers={"host": "API.example.org:443"}).status_code == 200


def test_no_page_may_call_unless_named(client: TestClient, keyed: TestClient) -> None:
    origin = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/completions", headers=origin).headers
    assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    allowed = keyed.options("/v1/completions", headers=origin)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    other = keyed.options("/v1/completions", headers={**origin, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_page_can_post_without_asking_is_refused(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/completions", content=json.dumps(PROMPT), headers={"content-type": kind})
    assert answer.status_code == 415


def test_bodies(client: TestClient) -> None:
    as_json = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/v1/completions", content=json.dumps(PROMPT), headers=as_json).status_code == 200
    large = client.post("/v1/completions", content=b" " * (2**20 + 1), headers=as_json)
    assert large.status_code == 413
    chunks = client.post("/v1/completions", content=iter([b" " * 2**19] * 3), headers=as_json)
    assert chunks.status_code == 413
    for content in (b"", b"{", b"nonsense", b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[1]", b"null"):
        answer = client.post("/v1/completions", content=content, headers=as_json)
        assert answer.status_code == 400, content
    packed = client.post("/v1/completions", content=b"x", headers={**as_json, "content-encoding": "gzip"})
    assert packed.status_code == 415


def test_headers(client: TestClient) -> None:
    assert client.get("/health", headers={f"x-{n}": "a" for n in range(120)}).status_code == 431
    assert client.get("/health", headers={"x": "a" * 17_000}).status_code == 431


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"a":' * 60_000, b"[" * 33 + b"]" * 33])
def test_deep_json(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "nested deeper than 32" in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def depth_of(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(JSON, st.booleans())
def test_depth_is_that_of_the_parsed_value(value: object, ascii_only: bool) -> None:
    text, depth = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace"), depth_of(value)
    check_depth(text, depth)
    if depth:
        with pytest.raises(ApiError):
            check_depth(text, depth - 1)


def test_addresses_that_others_reach_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="give API keys"):
            ServeSettings(host=host)
        assert ServeSettings(host=host, keys=KEYS).host == host
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert ServeSettings(host=host).keys == ()
    for field in ("allowed_hosts", "cors_origins"):
        with pytest.raises(ConfigError, match="every web page"):
            ServeSettings(**{field: ("*",)})  # type: ignore[arg-type]


def test_keys() -> None:
    assert read_keys(["# comment\nfirst\n\n second ,third\n", "", "first"]) == ("first", "second", "third")
    for key in ("short", "with a space inside it", "ünicode-key-0123456789"):
        with pytest.raises(ConfigError, match="API key 1 cannot be used"):
            ServeSettings(keys=(key,))
    assert KEYS[0] not in repr(ServeSettings(keys=KEYS))
