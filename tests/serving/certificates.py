"""A certificate for 127.0.0.1, made by openssl."""

import shutil
import subprocess

import pytest


def make_certificate(folder):
    """Write a certificate and its key; their paths."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    words = ["-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "1", "-subj"]
    more = ["/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", "-x509", *words, *more], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"
