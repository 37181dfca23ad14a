#!/usr/bin/env bash
# Creates the credentials of prod's etcd, and keeps them in Secrets only: an authority, a server and a client certificate
# (valid for ten years), and two passwords.
#
#   certificates.sh <namespace>                applies the Secrets
#   certificates.sh <namespace> <directory>    writes files instead (to keep them elsewhere, or to inspect them)
#
# ETCD_NAMES=DNS:etcd.example.org,IP:192.0.2.1 adds names with which other clusters reach etcd.
set -euo pipefail
namespace=${1:?usage: certificates.sh <namespace> [directory]}
directory=${2:-$(mktemp -d)}
[ $# -gt 1 ] || trap 'rm -rf "$directory"' EXIT
umask 077
mkdir -p "$directory"
cd "$directory"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }
sign() { # <name> <common name> <extensions>
    key "$1.key"
    openssl req -new -key "$1.key" -subj "/CN=$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" \
        -extfile <(printf '%s\n' "$3") 2>/dev/null
}

key ca.key
openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=diloco-etcd authority" -out ca.crt
# Members are servers and each other's clients: etcd resolves the names to verify a member.
names="DNS:localhost,IP:127.0.0.1"
for member in 0 1 2; do
    host=diloco-etcd-$member.diloco-etcd
    names+=",DNS:$host,DNS:$host.$namespace.svc,DNS:$host.$namespace.svc.cluster.local"
done
names+=${ETCD_NAMES:+,$ETCD_NAMES}
sign server diloco-etcd "extendedKeyUsage=serverAuth,clientAuth
subjectAltName=$names"
sign client diloco "extendedKeyUsage=clientAuth"
openssl rand -hex 24 | tr -d '\n' >root.password
openssl rand -hex 24 | tr -d '\n' >client.password
[ $# -eq 1 ] || exit 0

secret() { kubectl create secret generic "$@" --namespace "$namespace" --dry-run=client -o yaml | kubectl apply -f -; }
secret diloco-etcd-server --from-file=ca.crt --from-file=tls.crt=server.crt --from-file=tls.key=server.key
secret diloco-etcd-client --from-file=ca.crt --from-file=tls.crt=client.crt --from-file=tls.key=client.key \
    --from-file=password=client.password
secret diloco-etcd-root --from-file=password=root.password
