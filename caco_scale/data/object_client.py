"""obstore's clients of S3, GCS, Azure and web servers, and its errors in words."""

import os
import re
from typing import Any

from caco_scale.data.credentials import boto3_credentials, s3_config
from caco_scale.errors import UserError

CONNECT_SECONDS = 10
# Variables that may name an endpoint without TLS, which is then allowed.
ENDPOINTS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)


def connect(url: str, scheme: str, stall_seconds: float) -> Any:
    """The client of the objects below ``url``, with ``RetryPolicy.stall_seconds``. UserError: there can be none."""
    from obstore.store import HTTPStore, from_url

    endpoints = [os.environ.get(name, "") for name in ENDPOINTS]
    options: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if scheme == "s3":
        config = s3_config(os.environ)
        endpoints.append(config.get("endpoint", ""))
    client = {
        "connect_timeout": f"{min(CONNECT_SECONDS, stall_seconds):g}s",
        "read_timeout": f"{stall_seconds:g}s",
        "timeout": "86400s",  # of a whole body, however slow
        "allow_http": scheme == "http" or any(e.startswith("http://") for e in endpoints),
    }
    if config.pop("boto3", None):
        options["credential_provider"] = boto3_credentials()
    options |= {"client_options": client, "retry_config": {"max_retries": 0}}
    try:
        if scheme in ("http", "https"):
            # from_url takes the web addresses of public buckets for stores that want credentials.
            return HTTPStore.from_url(url, **options)
        return from_url(url, config=config or None, **options)  # ty: ignore[no-matching-overload]
    except Exception as error:
        hint = ""
        if scheme == "az" and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
            hint = ": set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY"
        raise UserError(f"{url} cannot be opened: {reason_of(error)}{hint}") from None


def reason_of(error: Exception) -> str:
    """obstore's message without its debugging part, in one line."""
    words = str(error).split("Debug source")[0]
    words = re.sub(r"<\?xml.*?\?>|<RequestId>.*?</RequestId>", "", words, flags=re.DOTALL)
    words = " ".join(re.sub(r"<[^>]*>", " ", words).split())
    return words[:300] or type(error).__name__
