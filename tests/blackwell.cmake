# Tests of the Blackwell backend.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
find_package(CUDAToolkit REQUIRED)

# Without any GPU: layouts and the emulated multiply against CuTe, refusals and shapes, what is in the library.
set(host_cutlass_includes ${FOURFOLD_CUTLASS_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
foreach(folder ${CUDAToolkit_INCLUDE_DIRS})
  list(APPEND host_cutlass_includes ${folder}/cccl)  # CUDA 13
endforeach()
add_unit_test(blackwell_layout_test)
target_include_directories(blackwell_layout_test SYSTEM PRIVATE ${host_cutlass_includes})
add_unit_test(blackwell_backend_test random_layer)
target_include_directories(blackwell_backend_test PRIVATE ${PROJECT_SOURCE_DIR})  # bench/shapes.h
string(REPLACE ";" "," architecture_list "${FOURFOLD_BLACKWELL_ARCHITECTURES}")
target_compile_definitions(blackwell_backend_test PRIVATE FOURFOLD_BLACKWELL_ARCHITECTURES="${architecture_list}")
add_test(NAME embedded_kernels
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/embedded_kernels_test.py
          $<TARGET_FILE:fourfold_command> ${CMAKE_CUDA_ARCHITECTURES} ${FOURFOLD_BLACKWELL_ARCHITECTURES})

# On any GPU that code of this build runs on: the stages around the GEMMs.
add_gpu_test(blackwell_stages blackwell_stages_test.cpp)
target_include_directories(blackwell_stages_test SYSTEM PRIVATE ${host_cutlass_includes})

# On a Blackwell GPU: whole layers.
add_gpu_test(blackwell_layer blackwell_native_backend.cpp $<TARGET_OBJECTS:gpu_layer_tests>
             $<TARGET_OBJECTS:random_layer>)

# On a Hopper GPU: whole layers with the emulated kernel of tests/CMakeLists.txt.
if(FOURFOLD_EMULATED_SM120)
  add_gpu_test(blackwell_emulated blackwell_emulated_backend.cpp $<TARGET_OBJECTS:gpu_layer_tests>
               $<TARGET_OBJECTS:random_layer> $<TARGET_OBJECTS:emulated_sm_120>)
endif()
