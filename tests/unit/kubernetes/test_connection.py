"""How an API server admits us: by a service account, certificates, a token, or what a program makes."""

import base64
import ipaddress
import json
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainer.etcd.certificates import _VALID
from trainer.errors import TrainingError
from trainer.kubernetes.api import connection
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.connection import Access, access_of, find_access
from trainer.kubernetes.api.kinds import CONFIG_MAP
