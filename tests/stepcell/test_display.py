"""No secret of a URL and no control character leaves the program."""

from __future__ import annotations

import pytest

from stepcell.display import displayed, printable, redacted
from stepcell.errors import InputError
from stepcell.json_text import json_text

SPELLINGS = [
    "rtsp://user:sEcReT@host/door",
    "rtsp://user:a@sEcReT@host/door",
    "rtsp://user:a/sEcReT@host/door",
    "rtsp://user:a?sEcReT#@host/door",
    "rtsp:/user:sEcReT@host/door",
    "https://sEcReT@host/door",
    "rtsp://user:sEcReT%40x@host",
    "srt://host:9000?mode=caller&passphrase=sEcReT",
    "srt://host:9000?streamid=read:door:user:sEcReT",
    "https://host/live.m3u8?access_token=sEcReT&x=1",
    "https://host/live.m3u8?X-Amz-Signature=sEcReT",
    "https://host/live?api%5Fkey=sEcReT",
    "https://host/live?PassWord=sEcReT",
    "https://host/live?password=a'sEcReT",
    "rtsp://host:554/user=admin_password=sEcReT_channel=1_stream=0.sdp",
    "rtsp://u:sEcReT@one/a rtsp://u:sEcReT@two/b",
    "concat:rtsp://u:sEcReT@one/a|rtsp://u:sEcReT@two/b",
    "https://proxy/?url=rtsp://u:sEcReT@host/door",
    "https://proxy/?url=rtsp%3A%2F%2Fu%3AsEcReT%40host%2Fdoor",
    "https://proxy/?url=rtsp%253A%252F%252Fu%253AsEcReT%2540host",
    "https://proxy/?next=a%3Ftoken%3DsEcReT%26b%3D1",
    "Authorization: Bearer sEcReT",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_no_spelling_of_a_secret_is_shown(text: str) -> None:
    for sentence in (text, f"{text}: cannot be opened", f"got '{text}'", f"({text})"):
        assert "sEcReT" not in redacted(sentence)
        error = InputError(sentence, hint=sentence)
        assert "sEcReT" not in f"{error} {error.message} {error.hint} {error.args}"
        assert "sEcReT" not in json_text({sentence: [sentence]})


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://host:554/door?channel=1&subtype=0: cannot be opened as video (Connection refused)",
        "a@b.mp4: cannot be read",
        "file:/a:b@c.mp4",
        "--set hidden=3: expected a list",
        "cell::op: a/b@c",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert displayed(text) == text


def test_what_surrounds_a_secret_stays() -> None:
    assert redacted("srt://h:9?passphrase=abc&mode=caller: lost") == "srt://h:9?passphrase=***&mode=caller: lost"
    assert redacted("got 'https://a:b@host/x', twice") == "got 'https://***@host/x', twice"


def test_control_characters_are_escaped() -> None:
    assert printable("\x1b]0;title\x07 \x9b31m \u202e \udcff") == r"\x1b]0;title\x07 \x9b31m \u202e \udcff"
    assert printable("line\n\tü 漢 😀") == "line\n\tü 漢 😀"
    assert "\\u" not in json_text({"name": "ü"})
