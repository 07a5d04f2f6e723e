#!/usr/bin/env bash
# Build an Open MPI that takes device memory, to be carried to a machine that has a GPU and perhaps
# no network.  Neither a GPU nor its driver is needed here: headers are, of a CUDA toolkit.
#
#   bash benchmarks/gpu/build_cuda_mpi.sh FOLDER [OPENMPI_SOURCE.tar]
#
# FOLDER/cuda-mpi.tar.xz (4 MB) is what comes out: cuda-mpi/{ompi,ucx} and cuda-mpi/env.sh, which may
# be unpacked anywhere on x86-64 Linux with a C library as new as this machine's.  `make gpu
# CUDA_MPI=cuda-mpi.tar.xz` takes it as it is; by hand,
#
#   . cuda-mpi/env.sh && mpirun $CUDA_MPI_FLAGS -n 4 python -m mpi4py ...
#
# Without a source of Open MPI 5 that of Debian is taken, through apt's own mirror (SUITE: trixie).
# UCX, which moves the bytes, comes with its CUDA transports as a Python wheel.  Eight minutes on two
# cores.  CUDA_HOME: where the toolkit is, /usr/local/cuda if not said.
set -euo pipefail

die() { echo "build_cuda_mpi: $*" >&2; exit 1; }

[ $# -ge 1 ] || die "expected a folder to work in"
work=$(realpath -m "$1")
source=${2:+$(realpath "$2")}
cuda=${CUDA_HOME:-/usr/local/cuda}
[ -f "$cuda/include/cuda.h" ] || die "no cuda.h in $cuda/include: CUDA_HOME names a toolkit"
for tool in gcc make python3 strip tar xz; do
  command -v $tool >/dev/null || die "$tool is missing"
done
version=$(sed -n 's/^#define CUDA_VERSION \([0-9]*\).*/\1/p' "$cuda/include/cuda.h")
mkdir -p "$work"
cd "$work"
rm -rf source wheel ucx stub cuda-mpi
mkdir source wheel ucx stub cuda-mpi

echo "1. the source of Open MPI"
if [ -z "$source" ]; then
  command -v apt-get >/dev/null || die "no apt here: name a source of Open MPI 5"
  mirror=$(apt-get indextargets --format '$(SITE)' | grep -v security | grep debian | head -n 1) ||
    die "apt knows no mirror of Debian: name a source of Open MPI 5"
  # Lists of its own: the system's are left alone.
  mkdir -p apt/lists/partial apt/cache/archives/partial
  keys=$(ls /usr/share/keyrings/debian-archive-keyring.* | head -n 1)
  echo "deb-src [signed-by=$keys] $mirror ${SUITE:-trixie} main" >apt/sources.list
  own=(-o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=-
    -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache")
  apt-get -q "${own[@]}" update
  (cd source && apt-get -q "${own[@]}" source --download-only openmpi)
  source=$(ls source/openmpi_*.orig.tar.*)
fi
mkdir source/tree
tar -C source/tree --strip-components=1 -xf "$source"

echo "2. UCX, from a wheel"
python3 -m pip download --quiet --no-deps --dest wheel "libucx-cu$((version / 1000))"
python3 -m zipfile -e wheel/libucx*.whl wheel
cp -r wheel/libucx/include wheel/libucx/lib ucx
# What names the folder that the wheel was built in would lead the build astray.
rm -rf ucx/lib/cmake ucx/lib/pkgconfig
find ucx/lib \( -name '*.a' -o -name '*.la' \) -delete
# A wheel has no links and so holds each library under several names.
find ucx/lib -name '*.so.0' | while read -r library; do
  ln -sf "$(basename "$library")" "${library%.0}"
  rm -f "$library.0.0"
done
find ucx/lib -name '*.so*' -type f -exec strip --strip-unneeded {} +

echo "3. something to link against in place of the driver, which is found when the program runs"
grep -ohE '\bcu[A-Z][A-Za-z0-9_]* *\(' "$cuda/include/cuda.h" | tr -d ' (' | sort -u |
  sed 's/.*/int &(void) { return 999; }/' >stub/stub.c
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o stub/libcuda.so stub/stub.c

echo "4. Open MPI itself; what it says is in source/tree/*.log"
(
  cd source/tree
  # Nothing of what is built in place of the machine's: the machine that it goes to has other ones.
  ./configure --quiet --prefix="$work/cuda-mpi/ompi" \
    --with-cuda="$cuda" --with-cuda-libdir="$work/stub" --with-ucx="$work/ucx" \
    --with-libevent=internal --with-hwloc=internal --with-pmix=internal --with-prrte=internal \
    --with-ofi=no --without-verbs --disable-oshmem --disable-io-romio --enable-mpi-fortran=no \
    --disable-static --disable-debug --disable-man-pages --disable-sphinx \
    --enable-mca-dso=accelerator-cuda,btl-smcuda,rcache-rgpusm,rcache-gpusm,pml-ucx,osc-ucx \
    LDFLAGS="-Wl,-rpath,$work/ucx/lib" >configure.log 2>&1 || die "configure failed: see $PWD"
  make --silent -j"$(nproc)" >make.log 2>&1 || die "make failed: see $PWD"
  make --silent install-strip >install.log 2>&1 || die "make install failed: see $PWD"
)

echo "5. what is carried"
cp -r ucx cuda-mpi/ucx
rm -rf cuda-mpi/ompi/include cuda-mpi/ompi/share/doc cuda-mpi/ucx/include
rm -f cuda-mpi/ucx/lib/ucx/libucx_perftest*
cat >cuda-mpi/env.sh <<'ENV'
# Sourced: the MPI of this folder, wherever that lies, in place of any other.
# Other shells do not say where a file lies that they source.
[ -n "${BASH_VERSION:-}" ] || { echo "cuda-mpi/env.sh: source this in bash" >&2; return 1; }
_cuda_mpi=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PATH="$_cuda_mpi/ompi/bin:$PATH"
export LD_LIBRARY_PATH="$_cuda_mpi/ompi/lib:$_cuda_mpi/ucx/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# Where it lies now, which is not where it was built.
export OPAL_PREFIX="$_cuda_mpi/ompi" PMIX_PREFIX="$_cuda_mpi/ompi" PRTE_PREFIX="$_cuda_mpi/ompi"
# mpi4py's wheels look here before they look for a library of the machine.
export MPI4PY_LIBMPI="$_cuda_mpi/ompi/lib/libmpi.so.40"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export UCX_TLS=${UCX_TLS:-sm,self,cuda_copy,cuda_ipc}
# More ranks than cores or devices are welcome, and UCX is taken without a fast network, too.
export CUDA_MPI_FLAGS="--oversubscribe --bind-to none -x LD_LIBRARY_PATH -x MPI4PY_LIBMPI -x UCX_TLS \
--mca pml ucx --mca pml_ucx_tls any --mca pml_ucx_devices any"
unset _cuda_mpi
ENV
tar -cJf cuda-mpi.tar.xz cuda-mpi
(. cuda-mpi/env.sh && ompi_info --parsable --all | grep -m1 cuda_support:value) ||
  die "what was built does not start, or knows nothing of CUDA"
ls -l "$work/cuda-mpi.tar.xz"
