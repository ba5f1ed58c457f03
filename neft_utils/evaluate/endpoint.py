"""One call to an OpenAI-compatible endpoint: whether it can be asked, and what it replied."""

import importlib.util
import ipaddress
import json
import os
from urllib.parse import urlsplit

RETRIES = 3  # by the client, after 429, 5xx, a cut connection or a timeout; 0.5 s doubling to 8 s
TIMEOUT = 60.0  # seconds for one reply; connecting gets 10


def available(settings):
    """(True, "") if the judge can be asked, else (False, one line with the cause and the remedy).

    Looks at settings, environment and packages; the endpoint is not contacted. Loopback addresses
    need neither key nor prices. Others need both: without prices `max_usd` could not be kept.
    """
    host, variable = host_of(settings), settings.key_variable
    key = os.environ.get(variable, "").strip()
    if host is None:
        return False, "judge base_url must look like https://host/v1, without user, query or #"
    if importlib.util.find_spec("openai") is None:
        return False, "the package openai is missing: pip install -r requirements.txt"
    if not (key.isascii() and key.isprintable() and " " not in key):
        return False, f"the environment variable {variable} holds no key: set it to the key alone"
    if is_loopback(host):
        return True, ""
    if not key:
        return False, f"no key for {host}: set the environment variable {variable}"
    if min(settings.usd_per_million_in, settings.usd_per_million_out) <= 0:
        names = "usd_per_million_in and usd_per_million_out"
        return False, f"{host}: set {names}, or max_usd cannot be kept (free: 1.0e-9)"
    return True, ""


def complete(client, model, system, user, max_tokens):
    """(reply, (tokens in, out) or None, failure in words or None, HTTP status or None).

    Of what a server sends in an error nothing is passed on: it may echo the key.
    """
    import openai

    roles = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=roles, temperature=0, max_tokens=max_tokens
        )
        body = json.loads(response.text)
        reply = body["choices"][0]["message"]["content"]
    except openai.APIStatusError as error:
        return None, None, f"HTTP {error.status_code}", error.status_code
    except openai.APIConnectionError as error:
        timeout = isinstance(error, openai.APITimeoutError)
        return None, None, "timeout" if timeout else "no connection", None
    except (openai.OpenAIError, ValueError, LookupError, TypeError, RecursionError):
        return None, None, "reply is no chat completion", None
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    used = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not all(type(number) is int and number >= 0 for number in used):
        used = None
    return reply, used, None, None


def client_of(settings):
    """An OpenAI client for a judge's settings; a context manager."""
    import openai

    return openai.OpenAI(
        base_url=settings.base_url,
        api_key=os.environ.get(settings.key_variable, "").strip() or "EMPTY",
        max_retries=RETRIES,
        http_client=openai.DefaultHttpxClient(
            trust_env=not is_loopback(host_of(settings)),  # no proxy reaches a loopback address
            timeout=openai.Timeout(TIMEOUT, connect=10.0),
        ),
    )


def host_of(settings):
    """The host of base_url, or None if that is no plain http(s) address."""
    try:
        url = urlsplit(settings.base_url)
        _ = url.port  # raises where it is no number
    except ValueError:
        return None
    plain = url.scheme in ("http", "https") and not ("@" in url.netloc or url.query or url.fragment)
    return url.hostname if plain else None


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
