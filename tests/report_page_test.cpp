// The HTML report where a run of the command does not reach: hostile text, explanations, numbers that are
// none.
#include "tools/report_page.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tools/report_charts.h"

namespace fourfold {
namespace {

LayerResult tiny_result() {
  LayerResult result;
  result.subject.model = "m";
  result.report.verdict = "kernel";
  result.report.activations.stages.push_back({});
  return result;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(ReportPage, EscapesWhatCouldBeMarkup) {
  EXPECT_EQ(html_text("<a href=\"x\">'&amp;'</a>"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;amp;&#39;&lt;/a&gt;");
  EXPECT_EQ(html_text("\x1b[31m\xff"), "\\x1b[31m\\xff");
}

TEST(ReportPage, HoldsHostileTextWhereverItComesFrom) {
  const std::string hostile = "</style><script>alert(1)</script>{{body}}";
  LayerResult result = tiny_result();
  result.subject.model = hostile;
  result.subject.facts.emplace_back(hostile, hostile);
  result.subject.notes.push_back(hostile);
  result.report.findings.push_back(hostile);
  result.report.checkpoint.left_out = hostile;
  result.report.explanations.push_back({hostile, 0.5, hostile});
  const std::string page = format_html(result);
  EXPECT_FALSE(contains(page, "<script>"));
  EXPECT_EQ(page.find("<style>"), page.rfind("<style>"));
  EXPECT_EQ(page.find("</main>"), page.rfind("</main>"));
}

TEST(ReportPage, ListsExplanationsInTheirOrderWithEvidence) {
  LayerResult result = tiny_result();
  EXPECT_FALSE(contains(format_html(result), "Explanation"));
  result.report.explanations = {{"scales transposed", 0.001, "fits all tokens"},
                                {"nibbles swapped", 0.9, ""}};
  const std::string page = format_html(result);
  EXPECT_LT(page.find("scales transposed"), page.find("nibbles swapped"));
  EXPECT_TRUE(contains(page, "fits all tokens"));
  EXPECT_TRUE(contains(format_json(result), "\"fault\": \"scales transposed\""));
}

TEST(ReportCharts, DrawNumbersThatAreNone) {
  ExpertErrors errors{"kernel", {"l1"}, {0, 1, 2}, {4, 0, 2}, {NAN, 0.0, INFINITY}};
  const std::string map = heat_map_svg(errors, 3e-3);
  EXPECT_TRUE(contains(map, "expert 0, l1: nan over 4 rows"));
  EXPECT_TRUE(contains(map, "expert 1, l1: no rows"));
  EXPECT_FALSE(contains(map, "\"nan\"") || contains(map, "\"inf\""));
  const TokenScatter scatter{"a", "b", 0, 2, {NAN, 1.0f}, {1.0f, INFINITY}};
  EXPECT_FALSE(contains(scatter_svg(scatter), "<circle"));
  EXPECT_FALSE(contains(layer_overview_svg({{0, NAN, true}, {1, INFINITY, true}}), "\"nan"));
}

TEST(Histogram, CountsEveryValueOnce) {
  Histogram histogram{"h", 10.0, -2.0, 1.0, std::vector<int64_t>(3)};
  for (const double value : {0.0, 1e-9, 0.01, 0.05, 0.1, 1.0, 1e9}) histogram.add(value);
  histogram.add(NAN);
  histogram.add(INFINITY);
  EXPECT_EQ(histogram.counts, (std::vector<int64_t>{3, 1, 2}));  // the outermost take what lies beyond
  EXPECT_EQ(histogram.zeros, 1);
  EXPECT_EQ(histogram.not_finite, 2);
}

}  // namespace
}  // namespace fourfold
