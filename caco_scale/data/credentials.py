"""Where the keys and the endpoint of an object store come from: the environment and the AWS files of a profile.

``AWS_*`` (``AWS_ENDPOINT_URL``, ``AWS_PROFILE`` and its files, ``AWS_SKIP_SIGNATURE=true`` for public buckets),
``GOOGLE_*``, ``AZURE_*``: obstore finds most of them by itself, and what it does not find is added here.
"""

import configparser
import os
from collections.abc import Mapping
from typing import Any

from caco_scale.errors import UserError


def s3_config(environment: Mapping[str, str]) -> dict[str, Any]:
    """What obstore does not find by itself: the profile's keys, region and endpoint, and a default region."""
    config = {}
    if not environment.get("AWS_REGION") and not environment.get("AWS_DEFAULT_REGION"):
        config["region"] = "us-east-1"
    if environment.get("AWS_ENDPOINT_URL_S3"):
        config["endpoint"] = environment["AWS_ENDPOINT_URL_S3"]
    profile = environment.get("AWS_PROFILE")
    values = _profile(profile or "default", environment)
    if profile and values is None:
        raise UserError(
            f"AWS_PROFILE is {profile}, which neither ~/.aws/credentials nor ~/.aws/config describes"
        )
    values = values or {}
    if "endpoint_url" in values and not any(environment.get(n) for n in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")):
        config.setdefault("endpoint", values["endpoint_url"])
    if "region" in values and "region" in config:
        config["region"] = values["region"]
    skip = environment.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    if environment.get("AWS_ACCESS_KEY_ID") or skip:
        return config
    if "aws_access_key_id" in values:
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        return config | {name.removeprefix("aws_"): values[name] for name in names if name in values}
    if any(name in values for name in ("role_arn", "sso_session", "sso_start_url", "credential_process")):
        config["boto3"] = True
    return config


def _profile(name, environment):
    """The values of a profile in the AWS files, or None where neither names it."""
    home = os.path.expanduser("~/.aws/")
    values = None
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        path = environment.get(variable) or home + file
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if parser.has_section(section):
            values = (values or {}) | dict(parser.items(section))
    return values


def boto3_credentials() -> Any:
    """Roles, single sign-on and credential processes are boto3's business."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UserError(
            "this AWS profile takes its keys from a role, single sign-on or a process, which needs boto3: "
            "pip install boto3"
        ) from None
    return Boto3CredentialProvider()
