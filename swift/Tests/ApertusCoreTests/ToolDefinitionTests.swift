import Foundation
import Testing

@testable import ApertusCore

/// Tools in TypeScript and JSON as Python writes them.
@Suite struct ToolDefinitionTests {
    @Test func declarationsArePythons() throws {
        let rows = try #require(try Fixtures.json("conversations/tools.json").items)
        #expect(rows.count >= sized(500, 150))
        for row in rows {
            let pair = try #require(row.items)
            let tools = try ToolDefinition.list(json: Data(pair[0].written.utf8))
            #expect(ToolDefinition.declarations(tools).utf8.elementsEqual(pair[1].bytes ?? []))
        }
    }

    @Test func valuesAreWrittenAsPythonWritesThem() throws {
        let rows = try #require(try Fixtures.json("conversations/values.json").items)
        #expect(rows.count >= sized(500, 150))
        for row in rows {
            let items = try #require(row.items)
            #expect(items[0].written.utf8.elementsEqual(items[1].bytes ?? []), "\(items[1])")
            #expect(items[0].pythonText.utf8.elementsEqual(items[2].bytes ?? []), "\(items[2])")
        }
    }

    @Test func oneToolIsMadeOfItsSchema() throws {
        let tool = try ToolDefinition(
            name: "get_weather", description: "Get current weather",
            parameters: """
                {"type": "object", "required": ["city"],
                 "properties": {"city": {"type": "string", "description": "City name"}}}
                """)
        let wanted =
            "// Get current weather\ntype get_weather = (_: {\n"
            + "// City name\ncity: string\n}) => any;"
        #expect(ToolDefinition.declarations([tool]) == wanted)
        #expect(
            try ToolDefinition.declarations([.init(name: "now")]) == "// now\ntype now = () => any;"
        )
    }

    @Test func whatIsNoToolIsRefusedByItsPlace() throws {
        let wrong = [
            ("{}", "tools: "), ("[3]", "tools[0]: "), ("[{}]", "tools[0].name: "),
            (#"[{"type": "web_search"}]"#, "tools[0].type: "),
            (#"[{"name": "a b"}]"#, "tools[0].name: "),
            (
                #"[{"name": "f"}, {"type": "function", "function": {"name": "f"}}]"#,
                "tools[1].function.name: "
            ),
            (#"[{"name": "f", "parameters": {"type": "array"}}]"#, "tools[0].parameters.type: "),
            (
                #"[{"name": "f", "parameters": {"properties": []}}]"#,
                "tools[0].parameters.properties: "
            ),
            (
                #"[{"name": "f", "parameters": {"properties": {"a": 3}}}]"#,
                "tools[0].parameters.properties.a: "
            ),
            (
                #"[{"name": "f", "parameters": {"properties": {"a": {"default": 1e999}}}}]"#,
                "tools[0].parameters.properties.a.default: "
            ),
            ("[", "tools: "),
        ]
        for (json, place) in wrong {
            do {
                _ = try ToolDefinition.list(json: Data(json.utf8))
                Issue.record("\(json) was taken")
            } catch let error as ApertusError {
                #expect(error.kind == .usage)
                #expect(error.description.hasPrefix(place), "\(error)")
            }
        }
    }
}
