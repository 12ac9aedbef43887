"""What fsspec and the clients of stores raise, as one line each that names the object and holds no credentials."""

import re

from surgery.errors import OutputError, SettingError, SourceError
from surgery.storage.url import Url

Kind = type[SourceError] | type[OutputError]

_EXTRAS = {
    "s3": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "az": ("azure", "adlfs"),
    "abfs": ("azure", "adlfs"),
    "abfss": ("azure", "adlfs"),
    "adl": ("azure", "adlfs"),
}
_PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_OF_US = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError, ImportError)
_NO_CREDENTIALS = re.compile(r"(No|Partial)?Credential\w*Error|\w*Credentials\w*|ProfileNotFound|TokenRetrievalError")
_NO_ROUTE = ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError")
_QUERY = re.compile(r"(\w+://[^\s?\"']*)\?[^\s\"']*")
_USER = re.compile(r"(\w+://)[^\s/@\"']+@")
_SECRET = re.compile(
    r"(?i)\b(\w*(?:authorization|signature|secret|password|token|credential|access_?key)\w*|sig)(\s*[=:]\s*)"
    r"(?:(?:bearer|basic)\s+)?[^\s,;&\"']+"
)
_KEY_ID = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b|\bhf_\w{8,}")
_LONGEST = 200


def missing_client(url: Url, error: Exception) -> SettingError:
    """Return the error of a scheme that nothing installed can speak."""
    extra, package = _EXTRAS.get(url.scheme, (None, None))
    if extra:
        return SettingError(
            f"{url}: expected {package} to be installed, got none. Install it: pip install 'model-surgery[{extra}]'."
        )
    if isinstance(error, ImportError):
        return SettingError(f"{url}: expected its client to be installed, got none ({redact(str(error))}).")
    return SettingError(f"{url}: expected s3://, gs://, az://, hf:// or another of fsspec's, got {url.scheme}://.")


def is_passing(error: BaseException) -> bool:
    """Tell whether the same request may do later what it did not do now."""
    permanent = (*_PERMANENT, *_OF_US)
    name = type(error).__name__
    return isinstance(error, Exception) and not (
        isinstance(error, permanent) or name in _NO_ROUTE or _NO_CREDENTIALS.fullmatch(name)
    )


def as_error(error: Exception, place: str, kind: Kind) -> SourceError | OutputError:
    """Return an error of a store in one line."""
    if isinstance(error, FileNotFoundError):
        return kind(f"{place}: expected it on the store, got no such object or bucket. Check the URL.")
    if isinstance(error, PermissionError) or _NO_CREDENTIALS.fullmatch(type(error).__name__):
        return kind(
            f"{place}: expected access to it, got {_said(error)}. Check the credentials that the store's client finds."
        )
    if type(error).__name__ in _NO_ROUTE:
        return kind(f"{place}: expected a store that answers, got {_said(error)}. Check its endpoint and the network.")
    return kind(f"{place}: expected an answer of the store, got {_said(error)}. Run the same command again.")


def redact(text: str) -> str:
    """Take what may be a credential out of a text: queries of URLs, keys, tokens, signatures."""
    text = _KEY_ID.sub("...", _USER.sub(r"\1...@", _QUERY.sub(r"\1", text)))
    return _SECRET.sub(r"\1\2...", text)


def _said(error: Exception) -> str:
    """Return the code and the first line of what the client said."""
    code = next((code for each in (error, error.__cause__) if (code := _code(each))), type(error).__name__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = redact(lines[0])[:_LONGEST].rstrip(".") if lines else ""
    return f"{code} ({words})" if words and words != code else code


def _code(error: BaseException | None) -> str | None:
    """Return botocore's code of a ClientError."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return found if isinstance(found, str) else None
