# Blackwell code needs nvcc 12.9 or later (sm_103a, sm_120f) and CUTLASS's headers: CUTLASS_DIR, a system's, or the PyPI
# package of the same, installed into the build folder. Included after FourfoldCuda.
# Its kernels take about three minutes of one core to compile.
set(FOURFOLD_BLACKWELL AUTO CACHE STRING "Backend for Blackwell GPUs: AUTO (where nvcc and CUTLASS are found), ON or OFF")
set_property(CACHE FOURFOLD_BLACKWELL PROPERTY STRINGS AUTO ON OFF)
set(FOURFOLD_BLACKWELL_ARCHITECTURES "100a;103a;120f" CACHE STRING "Blackwell architectures to compile kernels for")
set(CUTLASS_DIR "" CACHE PATH "Folder of CUTLASS, with include/cutlass/cutlass.h")
set(FOURFOLD_CUTLASS_VERSION 4.2.0.0)  # of the PyPI package nvidia-cutlass

# A kernel of CUTLASS takes up to 6 GB of memory to compile.
cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR jobs "${memory_mb} / 8000")
if(jobs LESS 1)
  set(jobs 1)
endif()
set(FOURFOLD_CUTLASS_JOBS ${jobs} CACHE STRING "CUTLASS kernels to compile at a time")
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cutlass=${FOURFOLD_CUTLASS_JOBS})

set(FOURFOLD_HAS_BLACKWELL OFF)
# Leaves the build without the backend, or ends it where it was asked for.
macro(fourfold_without_blackwell reason)
  if(FOURFOLD_BLACKWELL STREQUAL "ON")
    message(FATAL_ERROR "fourfold: FOURFOLD_BLACKWELL=ON, but ${reason}")
  endif()
  message(STATUS "fourfold: without Blackwell: ${reason}")
  return()
endmacro()

if(FOURFOLD_BLACKWELL STREQUAL "OFF" OR NOT FOURFOLD_HAS_CUDA)
  if(FOURFOLD_BLACKWELL STREQUAL "ON")
    message(FATAL_ERROR "fourfold: FOURFOLD_BLACKWELL=ON needs CUDA, which this build is without.")
  elseif(FOURFOLD_HAS_CUDA)
    message(STATUS "fourfold: without Blackwell (FOURFOLD_BLACKWELL=OFF)")
  endif()
  return()
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.9)
  fourfold_without_blackwell("nvcc is ${CMAKE_CUDA_COMPILER_VERSION}; sm_103a and sm_120f need 12.9 or later.")
endif()

set(installed ${PROJECT_BINARY_DIR}/cutlass)
# Another build folder of this tree may have them already.
file(GLOB others ${PROJECT_SOURCE_DIR}/build/*/cutlass/cutlass_library/source/include)
find_path(FOURFOLD_CUTLASS_INCLUDE cutlass/cutlass.h
  HINTS ${CUTLASS_DIR}/include ${CUTLASS_DIR} ${installed}/cutlass_library/source/include ${others})
if(NOT FOURFOLD_CUTLASS_INCLUDE)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(python ${Python3_EXECUTABLE})
  if(FOURFOLD_TEST_PYTHON)
    set(python ${FOURFOLD_TEST_PYTHON})
  endif()
  message(STATUS "fourfold: installing the headers of CUTLASS ${FOURFOLD_CUTLASS_VERSION} from PyPI into ${installed}")
  # -I: where pip builds this project, PYTHONPATH hides pip itself.
  execute_process(COMMAND ${python} -I -m pip install -q --no-deps --no-compile --target ${installed}
                          nvidia-cutlass==${FOURFOLD_CUTLASS_VERSION}
                  RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    fourfold_without_blackwell("CUTLASS was not found (set CUTLASS_DIR), and pip could not install it: ${output}")
  endif()
  find_path(FOURFOLD_CUTLASS_INCLUDE cutlass/cutlass.h HINTS ${installed}/cutlass_library/source/include)
endif()
if(NOT FOURFOLD_CUTLASS_INCLUDE)
  fourfold_without_blackwell("CUTLASS was not found in ${installed}. Set CUTLASS_DIR.")
endif()
set(FOURFOLD_HAS_BLACKWELL ON)
message(STATUS "fourfold: with Blackwell for ${FOURFOLD_BLACKWELL_ARCHITECTURES}, CUTLASS in ${FOURFOLD_CUTLASS_INCLUDE}")

# What code that includes CUTLASS is compiled with.
add_library(fourfold_cutlass INTERFACE)
target_include_directories(fourfold_cutlass SYSTEM INTERFACE ${FOURFOLD_CUTLASS_INCLUDE})
target_compile_options(fourfold_cutlass INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -diag-suppress=2908,20012>)
