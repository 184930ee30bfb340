# How every target of the project is compiled.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
# What FOURFOLD_EXPORT (include/fourfold/export.h) does not name is nobody's but the library's.
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

# With the compilers that the tests run with. Others warn of other things, rightly or not, and are to build.
set(known_compiler OFF)
if((CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION MATCHES "^12\\.") OR
   (CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND CMAKE_CXX_COMPILER_VERSION MATCHES "^14\\."))
  set(known_compiler ON)
endif()
option(FOURFOLD_WERROR "Warnings are errors" ${known_compiler})
set(FOURFOLD_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined")

option(FOURFOLD_UNITY "Compile the files of most rooms sixteen at a time, and small CUDA sources together" ON)

find_program(FOURFOLD_CCACHE ccache)
if(FOURFOLD_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${FOURFOLD_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${FOURFOLD_CCACHE})
endif()

# g++ collects its garbage from 128 MB on, a tenth of its time. Where there is memory, it may grow first.
cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
math(EXPR memory_per_core_mb "${memory_mb} / ${cores}")
if(memory_per_core_mb GREATER 3000)
  add_compile_options(
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:--param=ggc-min-heapsize=1000000>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<CXX_COMPILER_ID:GNU>>:-Xcompiler=--param=ggc-min-heapsize=1000000>)
endif()

add_library(fourfold_options INTERFACE)
# Rounding points are specified: the compiler must not fuse a multiplication with an addition.
target_compile_options(fourfold_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -ffp-contract=off>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${FOURFOLD_WERROR}>>:-Werror>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(fourfold_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)  # false alarms on std::string, GCC bug 105329
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(fourfold_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-sign-conversion>)  # part of -Wconversion there, not with GCC
endif()

# Fuzzers of the readers, tests/fuzz: with Clang's libFuzzer. The rest does not compile with Clang 14.
option(FOURFOLD_FUZZ "Build the fuzzers, for Clang; target 'fuzzers'" OFF)
if(FOURFOLD_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "fourfold: FOURFOLD_FUZZ=ON needs Clang, found ${CMAKE_CXX_COMPILER_ID}; try --preset fuzz")
  endif()
  set(FOURFOLD_SANITIZE "address,undefined,fuzzer-no-link")
endif()
if(FOURFOLD_SANITIZE)
  target_compile_options(fourfold_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FOURFOLD_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer>)
  if(FOURFOLD_SANITIZE MATCHES "address.*undefined")
    # What the address sanitizer finds too, where it matters, for a fifth of the time to compile.
    target_compile_options(fourfold_options INTERFACE
      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize=null,object-size,vptr>)
  endif()
  if(FOURFOLD_SANITIZE MATCHES "undefined" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Undefined behaviour ends in an illegal instruction, and the address sanitizer, where ASAN_OPTIONS has
    # handle_sigill=1 (the tests' environment has), prints the stack with file and line. What it was stands there. With
    # messages the code is a sixth larger to compile, and a process starts by registering 140,000 descriptions of checks.
    target_compile_options(fourfold_options INTERFACE
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize-undefined-trap-on-error>)
  endif()
  # Executables lie at fixed addresses: else a process first relocates its tables.
  target_link_options(fourfold_options INTERFACE
    -fsanitize=${FOURFOLD_SANITIZE} $<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:-no-pie>)
endif()

# Counters of executed lines, for scripts/coverage.sh. Atomic: OpenMP's threads count, too.
option(FOURFOLD_COVERAGE "Count executed lines, for gcov" OFF)
if(FOURFOLD_COVERAGE)
  target_compile_options(fourfold_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:--coverage -fprofile-update=atomic>)
  target_link_options(fourfold_options INTERFACE --coverage)
endif()

# Executables for another machine with the same kind of system: what such a machine may lack, or have in
# another version, is linked statically.
option(FOURFOLD_PORTABLE "Link fmt, libstdc++, libgcc and OpenMP statically" OFF)
if(FOURFOLD_PORTABLE)
  add_link_options(-static-libstdc++ -static-libgcc)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libgomp.a
                  OUTPUT_VARIABLE FOURFOLD_STATIC_OPENMP OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT IS_ABSOLUTE "${FOURFOLD_STATIC_OPENMP}")
    message(FATAL_ERROR "fourfold: FOURFOLD_PORTABLE=ON, but ${CMAKE_CXX_COMPILER} has no libgomp.a")
  endif()
  set(OpenMP_gomp_LIBRARY "${FOURFOLD_STATIC_OPENMP}" CACHE FILEPATH "OpenMP runtime" FORCE)
endif()

# Statically linked runtimes are not made for shared libraries, nor are libFuzzer's counters, gcov's would be
# another library's, and nothing that is sanitized uses it.
set(FOURFOLD_SHARED ON)
if(FOURFOLD_PORTABLE OR FOURFOLD_SANITIZE OR FOURFOLD_COVERAGE)
  set(FOURFOLD_SHARED OFF)
endif()
