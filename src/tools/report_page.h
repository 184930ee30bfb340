// The report as one HTML page that needs nothing but itself: no network, no script.
#pragma once

#include <string>
#include <string_view>

#include "tools/model_test.h"

namespace fourfold {

extern const std::string_view
    kReportPage;  ///< src/tools/report/page.html, with {{title}}, {{style}}, {{body}}
extern const std::string_view kReportStyle;  ///< src/tools/report/page.css

/// Text as HTML may have it, in elements and in quoted attributes; control characters and bytes that are not
/// UTF-8 made visible.
std::string html_text(std::string_view text);

std::string format_html(const LayerResult& result);
/// An overview, and a section for every layer, worst first.
std::string format_model_html(const ModelReport& report);

}  // namespace fourfold
