#!/bin/sh
# In a disposable host: start a TPM in software in /tmp/tpm, with two attestation keys, 0x81010002 and 0x81010003, whose
# public parts are ak.pub and other.pub there. swtpm.sh ROOT, where ROOT is the folder of the unpacked packages.
set -e
root=$1
libs=$root/usr/lib/x86_64-linux-gnu
mkdir -p /tmp/tpm/bin /tmp/tpm/state
cd /tmp/tpm
for program in "$root"/usr/bin/swtpm "$root"/usr/bin/tpm2_*; do
	name=bin/${program##*/}
	printf '#!/bin/sh\nLD_LIBRARY_PATH=%s:%s/swtpm:%s/lib/x86_64-linux-gnu exec %s "$@"\n' \
		"$libs" "$libs" "$root" "$program" >"$name"
	chmod +x "$name"
done
PATH=/tmp/tpm/bin:$PATH
export TPM2TOOLS_TCTI=swtpm:path=/tmp/tpm/sock
swtpm socket --tpm2 --tpmstate dir=/tmp/tpm/state --server type=unixio,path=/tmp/tpm/sock \
	--ctrl type=unixio,path=/tmp/tpm/sock.ctrl --flags startup-clear --daemon
tpm2_createek -Q -c ek.ctx -G ecc
key() {
	tpm2_createak -Q -C ek.ctx -c "$1.ctx" -G ecc -g sha256 -s ecdsa -f pem -u "$1.pub"
	tpm2_flushcontext -t
	tpm2_evictcontrol -Q -c "$1.ctx" "$2"
	tpm2_flushcontext -t
}
key ak 0x81010002
key other 0x81010003
