#!/usr/bin/env bash
# Every test that needs no GPU, on two cores: the daemons' tests one after the other with half of the unit tests beside
# them, then the other half. What runs beside yields to the daemons in both of Linux's ways: niceness counts only within
# a session where the scheduler groups by session, so the session is niced as a whole too.
set -uo pipefail
PYTHON=$1
mkdir -p build
beside='echo 19 >/proc/self/autogroup; exec nice -n 19 "$@"'
setsid sh -c "$beside" sh "$PYTHON" -m pytest -m "not gpu and not integration" tests/daemon tests/drafter tests/verifier \
    >build/unit-tests.log 2>&1 &
unit=$!
trap 'kill $unit 2>/dev/null' EXIT
trap 'exit 130' INT TERM
echo "[test] unit tests of daemon, drafter and verifier in the background (build/unit-tests.log), daemons here"
"$PYTHON" -m pytest -m integration
integration=$?
echo "[test] unit tests of the rest"
echo 0 2>/dev/null >"/proc/$unit/autogroup"
"$PYTHON" -m pytest -m "not gpu and not integration" --ignore=tests/daemon --ignore=tests/drafter --ignore=tests/verifier
rest=$?
echo "[test] waiting for the unit tests in the background"
wait $unit
units=$?
trap - EXIT
cat build/unit-tests.log
exit $((integration != 0 || units != 0 || rest != 0))
