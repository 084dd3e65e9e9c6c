#!/usr/bin/env bash
# Every test that needs no GPU: the daemons' tests one after the other, the unit tests beside them.
# The unit tests yield to the daemons, whose trainer is niced itself and would otherwise starve on two cores.
set -uo pipefail
PYTHON=$1
mkdir -p build
nice -n 19 "$PYTHON" -m pytest -m "not gpu and not integration" >build/unit-tests.log 2>&1 &
unit=$!
trap 'kill $unit 2>/dev/null' EXIT
trap 'exit 130' INT TERM
echo "[test] unit tests in the background (build/unit-tests.log), daemons here"
"$PYTHON" -m pytest -m integration
integration=$?
echo "[test] waiting for the unit tests"
wait $unit
units=$?
trap - EXIT
cat build/unit-tests.log
exit $((integration != 0 || units != 0))
