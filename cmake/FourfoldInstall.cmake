# What `cmake --install` puts where: command, both libraries, public headers, documents, and the files by which CMake
# and pkg-config find them. With folders below the prefix nothing that is installed names it, so a tree may be moved.
include(CMakePackageConfigHelpers)

install(TARGETS ${FOURFOLD_LIBRARIES} EXPORT fourfold
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS fourfold_command RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/fourfold DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/docs/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/docs FILES_MATCHING PATTERN "*.md")
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})

# find_package(fourfold 0.1): fourfold::static, fourfold::shared, and fourfold::fourfold, which is one of them.
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/fourfold)
install(EXPORT fourfold NAMESPACE fourfold:: FILE fourfoldTargets.cmake DESTINATION ${package_folder})
configure_package_config_file(cmake/fourfoldConfig.cmake.in ${PROJECT_BINARY_DIR}/fourfoldConfig.cmake
  INSTALL_DESTINATION ${package_folder} NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before version 1 a new minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fourfoldConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fourfoldConfig.cmake ${PROJECT_BINARY_DIR}/fourfoldConfigVersion.cmake
  DESTINATION ${package_folder})

# pkg-config: fourfold is the shared library, fourfold-static the archive with all that it needs.
set(FOURFOLD_STATIC_LIBS "-lfmt")
if(FOURFOLD_PORTABLE)
  set(FOURFOLD_STATIC_LIBS "")
endif()
foreach(library ${OpenMP_CXX_LIB_NAMES} stdc++ m)
  string(APPEND FOURFOLD_STATIC_LIBS " -l${library}")
endforeach()
if(FOURFOLD_HAS_CUDA)
  find_package(CUDAToolkit REQUIRED)
  string(APPEND FOURFOLD_STATIC_LIBS " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lrt -ldl -lpthread")
endif()
file(RELATIVE_PATH prefix_from_pc ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
set(FOURFOLD_PC_PREFIX "\${pcfiledir}/${prefix_from_pc}")
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")  # outside the prefix: such a tree can't be moved
  set(FOURFOLD_PC_PREFIX ${CMAKE_INSTALL_PREFIX})
endif()
foreach(folder LIBDIR INCLUDEDIR)
  set(FOURFOLD_PC_${folder} "\${prefix}")
  cmake_path(APPEND FOURFOLD_PC_${folder} "${CMAKE_INSTALL_${folder}}")
endforeach()
foreach(package fourfold fourfold-static)
  if(package STREQUAL "fourfold" AND NOT FOURFOLD_SHARED)
    continue()
  endif()
  configure_file(cmake/${package}.pc.in ${PROJECT_BINARY_DIR}/${package}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${package}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endforeach()
